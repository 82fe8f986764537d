import os
import subprocess
import sys
from pathlib import Path

from pipelines.local import guard
from tests.waiting import wait_until

# A command that ignores SIGTERM and leaves a daemon in a session of its own, as a Ray job's driver does.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
open(sys.argv[1] + f"/{os.getpid()}", "w").close()
time.sleep(600)
"""
OWNER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.local import guard
process = guard.start(
    sys.argv[2:],
    environment=dict(os.environ),
    directory=Path.cwd(),
    stdout=2,
)
print(process.pid, flush=True)
time.sleep(600)
"""


def started(directory: Path, count: int) -> set[int]:
    wait_until(lambda: len(list(directory.iterdir())) >= count)
    return {int(path.name) for path in directory.iterdir()}


def alive(pids: set[int]) -> set[int]:
    return {
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    }


def test_a_command_that_ignores_its_end_and_its_daemon_end_when_the_owner_is_killed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", STUBBORN, str(tmp_path)]
    root = str(Path(guard.__file__).parents[2])
    owner = subprocess.Popen([sys.executable, "-c", OWNER, root, *command], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    guard_pid = int(owner.stdout.readline())
    pids = started(tmp_path, 2) | {guard_pid}
    assert alive(pids) == pids
    owner.kill()
    owner.communicate()
    wait_until(lambda: not alive(pids))


def test_stop_ends_the_command_with_sigterm_first(tmp_path):
    script = 'trap "echo asked > asked; exit 0" TERM; touch up; while :; do sleep 0.05; done'
    with (tmp_path / "log").open("wb") as log:
        process = guard.start(
            ["/bin/sh", "-c", script], environment=dict(os.environ), stdout=log.fileno(), directory=tmp_path
        )
    wait_until((tmp_path / "up").exists)
    guard.stop(process)
    assert (tmp_path / "asked").read_text() == "asked\n"
    guard.stop(process)  # harmless
