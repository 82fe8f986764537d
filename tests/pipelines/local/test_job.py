"""A Ray job as a process of this machine: what it answers, tells and fails with, and that none outlives its caller."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.shared.errors import DataError, JobError
from components.shared.protocol import Line
from pipelines.local.job import Job, answer, watch
from pipelines.local.server import ROOT, job_environment
from tests.waiting import wait_until

JOB = """
import json, sys
from components.shared.errors import DataError
from components.shared.protocol import say, say_failure
say("asked", "half way")
print("a library's noise", file=sys.stderr)
if "--wrong" in sys.argv:
    say_failure("asked", DataError("every answer is empty"))
    sys.exit(2)
if "--crash" in sys.argv:
    raise MemoryError("no memory left")
print(json.dumps({"arguments": sys.argv[1:], "long": "x" * 100_000}))
"""
TALKS = """
import os, sys
print("ready", os.getpid(), file=sys.stderr, flush=True)
while line := sys.stdin.readline():
    print("heard", line.strip(), flush=True)
sys.exit(3)
"""
TALKER = "import sys; from pipelines.local.job import Job, talk; sys.exit(talk(Job('talks', 'config.toml')))"

AT_ONCE = """
import os, subprocess, sys
from pipelines.local import guard
class Slow(subprocess.Popen):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
guard.subprocess.Popen = Slow
os._exit(guard.run(["sh", "-c", "exit 3"], subprocess.DEVNULL))
"""


@pytest.fixture(autouse=True)
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that `python -m` finds, as it finds those of ray_jobs."""
    (tmp_path / "asked.py").write_text(JOB)
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))


def test_a_job_gets_its_config_and_overrides_and_its_last_line_is_the_answer() -> None:
    lines: list[str] = []
    body = answer(Job("asked", "s3://b/c.toml", ["--all"], ["a.b=1", "c.d=2"]), on_line=lines.append)
    assert body["arguments"] == ["--config", "s3://b/c.toml", "--set", "a.b=1", "--set", "c.d=2", "--all"]
    assert len(body["long"]) == 100_000  # more than a pipe holds at once
    assert lines == ["half way"]


@pytest.mark.slow
def test_where_there_is_no_gpu_a_job_does_not_load_the_compiler(tmp_path, monkeypatch):
    (tmp_path / "asked.py").write_text(
        "import bitsandbytes, json, sys\nprint(json.dumps({'loaded': 'torch._inductor.compile_fx' in sys.modules}))"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert answer(Job("asked", "config.toml")) == {"loaded": False}
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    assert answer(Job("asked", "config.toml")) == {"loaded": True}
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert job_environment(os.environ).keys() == {"PYTHONPATH"}


def test_what_a_job_fails_with_is_raised_and_a_crash_shows_its_last_lines() -> None:
    with pytest.raises(DataError, match="every answer is empty"):
        answer(Job("asked", "config.toml", ["--wrong"]))
    with pytest.raises(JobError, match=r"asked ended with 1 and gave no reason:\n(.*\n)*MemoryError: no memory left"):
        answer(Job("asked", "config.toml", ["--crash"]))


def test_a_job_that_talks_has_its_callers_three_streams_and_exit_code() -> None:
    command = [sys.executable, "-c", TALKER]
    done = subprocess.run(command, input="one\ntwo\n", capture_output=True, text=True, check=False)
    assert done.stdout == "heard one\nheard two\n"
    assert re.fullmatch(r"ready \d+\n", done.stderr)
    assert done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_job_talks_at_a_terminal_and_goes_with_its_caller(number: signal.Signals) -> None:
    # A terminal belongs to one session; the job has a session of its own, and reads from it all the same.
    ours, theirs = pty.openpty()
    code = "import os, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + TALKER
    pipes = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, start_new_session=True, **pipes) as caller:
        pid = int(caller.stderr.readline().split()[1])
        os.write(ours, b"typed\n")
        assert caller.stdout.readline() == "heard typed\n"
        caller.send_signal(number)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        caller.communicate()
    os.close(ours)
    os.close(theirs)


PIPELINE = """
import sys
sys.path.insert(0, sys.argv[1])
from components.shared.errors import DataError
from components.shared.protocol import say, say_failure
say("library", "speaks as steps do, and is none")
say("distil", "started")
say("distil", "1/2")
print("(RayTrainWorker pid=7, ip=10.0.0.7) [distil] 1/2")
print("unfinished", end="")
print()
say_failure("distil", DataError("the first"))
say_failure("report", DataError("of a step that never began"))
sys.stdout.write("the end, without a new line")
sys.exit(3)
"""


def test_every_line_of_a_step_that_has_started_is_heard_once_and_everything_is_in_the_log(tmp_path: Path) -> None:
    heard: list[Line] = []
    command, log_path = [sys.executable, "-c", PIPELINE, str(ROOT)], tmp_path / "log"
    ended = watch(
        command, environment={}, directory=tmp_path, log_path=log_path, on_line=heard.append, on_tick=lambda: None
    )
    assert [(line.step, line.text) for line in heard[:-1]] == [("distil", "started"), ("distil", "1/2")]
    assert heard[-1].failure is not None
    assert (ended.exit_code, ended.failed_step) == (3, "distil")
    assert str(ended.failure) == "the first"
    log = log_path.read_text().splitlines()
    assert log[0] == "[library] speaks as steps do, and is none"
    assert log[-1] == "the end, without a new line"


def test_a_command_that_ends_before_its_guard_looks_ends_the_guard_with_its_exit_code() -> None:
    with subprocess.Popen([sys.executable, "-c", AT_ONCE], stdin=subprocess.PIPE) as ended:
        try:
            assert ended.wait(60) == 3
        finally:
            ended.kill()
