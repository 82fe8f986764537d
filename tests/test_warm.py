"""What is forked behaves as what is started: the same program by both Pythons."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.waiting import PATIENCE_S, wait_until

REAL = sys.executable
WAITS = "open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'up'); time.sleep(600)"
ENDS = {
    "streams": "print(sys.stdin.read(), sys.argv[1:], os.getcwd(), os.environ['MARK'], os.umask(0))",
    "a code": "atexit.register(print, 'at the end'); sys.exit(3)",
    "a sentence": "sys.exit('no room')",
    "an aside": "print('aside', file=sys.stderr)",
    "an error": "print('before', end=''); 1 / 0",
    "a signal": "os.kill(os.getpid(), signal.SIGKILL)",
}


def begin(python: str, code: str, folder: Path) -> "subprocess.Popen[str]":
    package = folder / "path" / "ray_jobs"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "sweep.py").write_text(f"import atexit, os, signal, sys, time\n{code}\n")
    return subprocess.Popen(
        [python, "-m", "ray_jobs.sweep", "a", "b c"],
        cwd=folder,
        env={**os.environ, "MARK": "x", "PYTHONPATH": str(folder / "path")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ENDS)
def test_it_reads_says_and_ends_the_same(how: str, forked: None, tmp_path: Path) -> None:
    seen = []
    for python in (REAL, sys.executable):
        with begin(python, ENDS[how], tmp_path) as process:
            out, err = process.communicate("typed", timeout=PATIENCE_S)
        seen.append((process.returncode, out, err.splitlines()[-1:]))
    assert seen[0] == seen[1]


def test_a_signal_reaches_it_and_it_does_not_outlive_whom_it_stands_for(forked: None, tmp_path: Path) -> None:
    handles = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); {WAITS}"
    for number, code in ((signal.SIGTERM, 5), (signal.SIGKILL, -9)):
        with begin(sys.executable, handles, tmp_path) as process:
            wait_until((tmp_path / "up").exists, number)
            pid = int((tmp_path / "up").read_text())
            (tmp_path / "up").unlink()
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == code
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), pid)


def test_whoever_is_killed_while_it_asks_takes_nobody_along(forked: None, tmp_path: Path) -> None:
    for delay_s in (0.0, 0.01, 0.02, 0.03, 0.05, 0.08):
        with begin(sys.executable, WAITS, tmp_path) as process:
            time.sleep(delay_s)
            process.kill()
            process.communicate(timeout=PATIENCE_S)  # its streams are closed with it
    with begin(sys.executable, "print('here')", tmp_path) as process:
        assert process.communicate(timeout=PATIENCE_S)[0] == "here\n"
