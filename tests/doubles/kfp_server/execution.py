"""A run as it happens: its process, what kfp.local says of its steps, and how it is ended."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.doubles.kfp_server.errors import invalid
from tests.doubles.kfp_server.resolving import unresolved
from tests.doubles.kfp_server.specs import Pipeline
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]
PIPELINE_ROOT = "minio://mlpipeline/v2/artifacts"
GRACE_S = 1.0  # what a step has between SIGTERM and SIGKILL when its run is terminated
OVER = {"SUCCEEDED", "FAILED", "SKIPPED"}  # a run that is terminated ends as FAILED: no code of 2.17 writes CANCELED
_COLOUR = re.compile(r"\x1b\[\d+m")
_BEGAN = re.compile(r"- INFO - Executing task '([^']+)'")
_ENDED = re.compile(r"- (?:INFO|ERROR) - Task '([^']+)' finished with status (\w+)")
NO_PIP = "raise SystemExit('the image of a step has no pip')\n"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Execution:
    """One run. `record` is what the API shows of it, `tasks` its steps."""

    def __init__(
        self, record: dict[str, Any], pipeline: Pipeline, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.record = record
        self.pipeline = pipeline
        self.folder = folder
        self.tasks: dict[str, dict[str, Any]] = {}
        self.reason = ""
        """Why it failed; the API says it of no run and no step (2.17, server/api_converter.go)."""
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir(parents=True)
        (folder / "no_pip").mkdir()
        (folder / "no_pip" / "pip.py").write_text(NO_PIP)
        (folder / "pipeline.yaml").write_text(pipeline.as_yaml())
        (folder / "parameters.json").write_text(json.dumps(_as_defined(pipeline, record["runtime_config"])))
        path = os.pathsep.join(filter(None, [str(folder / "no_pip"), environment.get("PYTHONPATH", "")]))
        self._environment = {**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self._set("PENDING")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return self.record["state"] in OVER

    @property
    def log(self) -> str:
        """Everything that the run printed."""
        return (self.folder / "log").read_text()

    def shown(self) -> dict[str, Any]:
        """The run as GetRun answers: each step, and the nodes that the cluster has around them."""
        with self._lock:
            nodes = [_node("root", self.record["state"], self.record["created_at"])] if self.tasks else []
            for task in self.tasks.values():
                began = task["start_time"]
                nodes += [_node(f"{task['display_name']}-driver", "SUCCEEDED", began), task]
                nodes.append(_node("executor", task["state"], began))
            return {**self.record, "run_details": {"task_details": [dict(node) for node in nodes]}}

    def terminate(self) -> None:
        """Ask it to end: SIGTERM for the whole session, a little later SIGKILL.

        Refused for a run that is over or being terminated already (2.17, storage/run_store.go, TerminateRun).
        """
        with self._lock:
            if self.record["state"] not in ("PENDING", "RUNNING"):
                raise invalid(f"Failed to terminate a run {self.record['run_id']}. Row not found")
            self._set("CANCELING")
        self._signal(signal.SIGTERM)
        threading.Timer(GRACE_S, self._signal, (signal.SIGKILL,)).start()

    def kill(self) -> None:
        """End it at once, as when its workflow is deleted, and wait for that."""
        with self._lock:
            if self._process is None and not self.is_over:
                self._set("CANCELING")  # before it has begun
        self._signal(signal.SIGKILL)
        self._thread.join()

    def wait(self, timeout_s: float = 3 * PATIENCE_S) -> str:
        """The state that it ended in."""
        self._thread.join(timeout_s)
        assert self.is_over, f"run {self.record['run_id']} is still {self.record['state']}:\n{self.log}"
        return str(self.record["state"])

    def _work(self) -> None:
        with (self.folder / "log").open("w") as log:
            with self._lock:
                if self.record["state"] == "PENDING":
                    self._set("RUNNING")
                    self._process = self._start()
            if self._process is not None:
                with self._process.stdout as printed:
                    for line in printed:
                        log.write(line)
                        log.flush()
                        self._hear(_COLOUR.sub("", line))
                self._process.wait()
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.doubles.kfp_server.child", str(self.folder), self.record["run_id"]]
        session = {"cwd": ROOT, "env": self._environment, "start_new_session": True}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*command, sys.executable], errors="replace", **session, **pipes)

    def _hear(self, line: str) -> None:
        with self._lock:
            if found := _BEGAN.search(line):
                self.tasks[found[1]] = _node(found[1], "RUNNING", now())
            elif found := _ENDED.search(line):
                task = self.tasks[found[1]]
                task.update(state="SUCCEEDED" if found[2] == "SUCCESS" else "FAILED", end_time=now())

    def _end(self) -> None:
        for task in self.tasks.values():
            if task["state"] == "RUNNING":
                task.update(state="FAILED", end_time=now())
        self.record["finished_at"] = now()
        exit_code = self._process.returncode if self._process else 0
        root = f"{self.record['runtime_config'].get('pipeline_root') or PIPELINE_ROOT}/{self.pipeline.name}/"
        foreign = sorted(set(_foreign_uris(self.folder / "outputs", root + self.record["run_id"])))
        if self.record["state"] == "CANCELING":
            self._set("FAILED", "terminated")
        elif exit_code:
            failed = [name for name, task in self.tasks.items() if task["state"] == "FAILED"]
            self._set("FAILED", f"task {', '.join(failed)}: main: Error (exit code {exit_code})")
        elif failing := [(name, why) for name, why in unresolved(self.pipeline.spec) if name in self.tasks]:
            for name, _ in failing:
                self.tasks[name]["state"] = "FAILED"
            self._set("FAILED", "; ".join(f"task {name}: {why}" for name, why in failing))
        elif foreign:
            self._set("FAILED", f'URI "{foreign[0]}" does not have expected bucket prefix "{root}"')
        else:
            self._set("SUCCEEDED")

    def _set(self, state: str, reason: str = "") -> None:
        self.record["state"] = state
        self.record.setdefault("state_history", []).append({"update_time": now(), "state": state})
        self.reason = reason

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            for session in self._sessions():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(session, number)

    def _sessions(self) -> set[int]:
        """Of its process, and of the one that was forked for it and has the steps: tests/warm.py."""
        if self._process is None:
            return set()
        forked = self.folder / "pid"
        return {self._process.pid, *(map(int, forked.read_text().split()) if forked.exists() else ())}


def _as_defined(pipeline: Pipeline, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters for kfp.local, which minds how a number is written where JSON and the server do not."""
    types = {"NUMBER_DOUBLE": float, "NUMBER_INTEGER": int}
    kinds = {name: types.get(defined["parameterType"]) for name, defined in pipeline.parameters.items()}
    given = config.get("parameters") or {}
    return {name: kind(value) if (kind := kinds[name]) else value for name, value in given.items()}


def _node(name: str, state: str, began: str) -> dict[str, Any]:
    node = {"display_name": name, "state": state, "create_time": began, "start_time": began}
    return {**node, "end_time": began} if state in OVER else node


def _foreign_uris(outputs: Path, root: str) -> Iterator[str]:
    """Remote URIs that the cluster's launcher would not upload to: those outside the run's own folder."""
    for written in outputs.rglob("executor_output.json"):
        for artifacts in (json.loads(written.read_text()).get("artifacts") or {}).values():
            for artifact in artifacts.get("artifacts", []):
                uri = artifact.get("uri", "")
                if "://" in uri and not uri.startswith(root):
                    yield uri
