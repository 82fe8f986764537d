"""A command that is interrupted or killed: what it says, and what it leaves running."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.doubles.http_server import serving
from tests.pipelines.command_line import begun, fineloop
from tests.waiting import PATIENCE_S, wait_until


@pytest.mark.parametrize(
    ("command", "number"), [("run", signal.SIGINT), pytest.param("train", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_leaves_nothing_behind_and_is_no_failure_to_tell_of(
    stub_cluster, config_path, answer, tmp_path, monkeypatch, command, number
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    told: list[bytes] = []
    with serving(lambda *request: told.append(request[3]) or (200, {})) as url:
        running, mark = begin(command, config_path, tmp_path, "--set", f"announce.webhook={url}")
        wait_until((stub_cluster.directory / "hanging").exists)
        assert len(processes_with(mark)) > 1
        (folder,) = (tmp_path / ".fineloop" / "runs").iterdir()
        second = fineloop(command, "-c", folder / "config.toml", "--run-id", folder.name, cwd=tmp_path)
        assert second.returncode == 2
        assert f"run {folder.name} is under way in another process" in second.stderr
        assert answer("runs", "show", folder.name)["outcome"] == "running: finetune"

        running.send_signal(number)
        out, err = (each.decode() for each in running.communicate(timeout=PATIENCE_S))
    assert (running.returncode, out) == (130, "")
    said, goes_on = err.splitlines()[-2:]
    assert said.startswith("interrupted")
    resume = f"fineloop {command} -c .fineloop/runs/{folder.name}/config.toml --run-id {folder.name}"
    assert goes_on.endswith(resume)
    shown = answer("runs", "show", folder.name)
    assert (shown["outcome"], shown["next"]) == ("interrupted in finetune", [resume])
    assert "Traceback" not in err
    assert processes_with(mark) == []
    assert [job.status for job in stub_cluster.jobs.values()] == ["STOPPED"]
    assert told == []


def test_a_run_killed_outright_takes_its_steps_with_it(stub_cluster, config_path, tmp_path):
    running, mark = begin("run", config_path, tmp_path)
    wait_until((stub_cluster.directory / "hanging").exists)
    running.kill()
    running.communicate()

    wait_until(lambda: not processes_with(mark), lambda: processes_with(mark))
    assert [job.status for job in stub_cluster.jobs.values()] == ["STOPPED"]


def begin(command: str, config_path: Path, cwd: Path, *more: str) -> "tuple[subprocess.Popen[bytes], str]":
    """A command whose training hangs, and a variable that all of its processes inherit."""
    mark = f"FINELOOP_TEST_{os.getpid()}_{time.time_ns()}"
    return begun(command, "-c", config_path, "--set", "method.dropout=0.3", *more, cwd=cwd, **{mark: "1"}), mark


def processes_with(variable: str) -> list[int]:
    """Process ids that inherited the variable."""
    return [each.pid for each in psutil.process_iter(["environ"]) if variable in (each.info["environ"] or {})]
