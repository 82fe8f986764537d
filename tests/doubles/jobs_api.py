"""A double of Ray's Jobs API: the six calls that the client makes, and each entry point as a real process."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.doubles.http_server import Answer, serving

TOKEN = "0123456789abcdef" * 4
RAY_VERSION = importlib.metadata.version("ray")  # importing ray fixes its authentication for the whole process

Drop = Literal["taken", "lost"]


@dataclass
class FakeJob:
    submission_id: str
    entrypoint: str
    metadata: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes]
    stopped: bool = False

    @property
    def status(self) -> str:
        code = self.process.poll()
        if code is None:
            return "RUNNING"
        if self.stopped:
            return "STOPPED"
        return "SUCCEEDED" if code == 0 else "FAILED"

    def details(self) -> dict[str, Any]:
        asked = {key: getattr(self, key) for key in ("submission_id", "entrypoint", "metadata")}
        return {"type": "SUBMISSION", **asked, "status": self.status, "driver_exit_code": self.process.poll()}


class JobsApi:
    """Listens on loopback from construction to `close`."""

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None, *, token: str = "") -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.directory = directory
        self.environment = {**os.environ, **(environment or {})}
        self.token = token
        self.drop_submissions: list[Drop] = []
        """What becomes of the next ones, whose connection is closed without an answer."""
        self._ends = ExitStack()
        self.address = self._ends.enter_context(serving(self._serve))

    def _serve(
        self, verb: str, path: str, _query: Mapping[str, str], body: bytes, headers: Mapping[str, str]
    ) -> Answer | None:
        is_submission = (verb, path) == ("POST", "/api/jobs/")
        drop = self.drop_submissions.pop(0) if is_submission and self.drop_submissions else None
        if drop == "lost":
            return None
        answered = self.answer(verb, path, json.loads(body or b"null"), headers.get("Authorization", ""))
        return None if drop else answered

    def answer(self, verb: str, path: str, body: Any, authorization: str) -> tuple[int, Any]:
        if self.token and authorization != f"Bearer {self.token}":
            return 401, "Unauthorized: Missing authentication token"
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": RAY_VERSION, "ray_commit": "", "session_name": "double"}
        if path == "/api/jobs/":
            return (200, [job.details() for job in self.jobs.values()]) if verb == "GET" else self._submit(body)
        match = re.fullmatch(r"/api/jobs/([^/]+)(/logs|/stop)?", path)
        job = self.jobs.get(match[1]) if match else None
        if match is None or job is None:
            return 404, f"Job {path} does not exist."
        if match[2] == "/logs":
            return 200, {"logs": job.log_path.read_text()}
        if match[2] == "/stop":
            was_running = job.status == "RUNNING"
            self._end(job)
            return 200, {"stopped": was_running}
        return 200, job.details()

    def close(self) -> None:
        self._ends.close()
        for job in self.jobs.values():
            self._end(job)

    def _submit(self, body: dict[str, Any]) -> tuple[int, Any]:
        submission_id = body["submission_id"]
        if submission_id in self.jobs:
            return 500, f"Job with submission_id {submission_id} already exists."
        log_path = self.directory / f"{submission_id}.log"
        session = {"cwd": self.directory, "env": self.environment, "start_new_session": True}
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S602 - a shell, as Ray does
                body["entrypoint"], shell=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **session
            )
        self.jobs[submission_id] = FakeJob(submission_id, body["entrypoint"], body["metadata"], log_path, process)
        return 200, {"job_id": submission_id, "submission_id": submission_id}

    @staticmethod
    def _end(job: FakeJob) -> None:
        if job.process.poll() is None:
            job.stopped = True
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def stub_cluster(directory: Path, environment: Mapping[str, str]) -> JobsApi:
    """A Jobs API whose `python -m ray_jobs.X` is the stub's; `environment` points its jobs at a store."""
    root = Path(__file__).resolve().parents[2]
    package = directory / "ray_jobs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, stub in (("candidate", "stub_jobs.py"), ("evaluate", "stub_jobs.py"), ("sweep", "stub_sweep.py")):
        path = str(root / "tests" / "doubles" / stub)
        (package / f"{name}.py").write_text(f"import runpy\nrunpy.run_path({path!r}, run_name='__main__')\n")
    found = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{directory}:{root}"}
    return JobsApi(directory, {**environment, **found}, token=TOKEN)
