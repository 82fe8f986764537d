"""Jobs on a cluster that exists, through Ray's Jobs API.

Token authentication is Ray's own: RAY_AUTH_MODE=token, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
"""

import contextlib
import re
import shlex
import time
from collections.abc import Callable
from typing import Any

from components.ray_cluster.backend import STOP_S, UNREACHABLE_S, Job, JobEnd, LiveJob, LogCopy, State, repeated, rest_s
from components.shared.errors import JobError, UserError
from components.shared.machine import in_environment


class JobsApi:
    """The jobs of one cluster, known by their submission ids."""

    noun = "Ray job"

    def __init__(self, address: str) -> None:
        """Raises UserError: there is no address, or it is no URL; JobError: the cluster is out of reach."""
        if not address:
            raise UserError("RAY_ADDRESS is not set: set it to a cluster's Jobs API, such as http://HOST:8265")
        if not address.startswith(("http://", "https://")):
            raise UserError(f"RAY_ADDRESS {address!r} is not the URL of a Jobs API, such as http://HOST:8265")
        from ray.job_submission import JobSubmissionClient  # half a second

        with in_environment({"RAY_API_SERVER_ADDRESS": address}):  # Ray lets its variables win over the argument
            self._client = _call(f"connect to {address}", lambda: JobSubmissionClient(address))

    def job_id(self, job: Job, attempt: int) -> str:
        return f"fineloop-{job.run_id}-{job.task}-{attempt}"

    def attempts(self, job: Job) -> dict[int, State]:
        pattern = re.compile(re.escape(self.job_id(job, 0)[:-1]) + r"(\d+)")
        return {
            int(match[1]): _state(details.status)
            for details in _call("list jobs", self._client.list_jobs)
            if (match := pattern.fullmatch(details.submission_id or ""))
        }

    def start(self, job: Job, attempt: int) -> None:
        """Submit it, and try again: a head answers before it can take jobs, and a busy one drops some connections."""
        import requests

        submission_id, was_dropped = self.job_id(job, attempt), False

        def submit() -> None:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(job.command), submission_id=submission_id, metadata=job.about
                )
            except RuntimeError as exc:
                if not (was_dropped and "already exists" in str(exc)):
                    raise

        def may_pass(exc: Exception) -> bool:
            nonlocal was_dropped
            if isinstance(exc, ConnectionError | requests.RequestException):
                was_dropped = True  # and the answer that says whether the job was taken is lost
                return True
            # A head answers before the agent that starts jobs has registered. Other refusals are final: a job that was
            # accepted after all would be refused as a duplicate.
            return isinstance(exc, RuntimeError) and "No available agent" in str(exc)

        _call(f"submit {submission_id}", lambda: repeated(submit, may_pass, for_s=UNREACHABLE_S, every_s=0.2))

    def adopt(self, job_id: str) -> None:
        """Do nothing: a job does not belong to the process that submitted it."""

    def follow(self, job: Job, job_id: str, log: LogCopy, poll_s: float) -> JobEnd:
        """Ask for the status every `poll_s`, and for the log when it is due or the job has ended."""
        deadline, due = time.monotonic() + job.timeout_s, 0.0
        while True:
            status = _call("read the job's status", lambda: self._client.get_job_status(job_id), UNREACHABLE_S)
            if status.is_terminal() or time.monotonic() >= due:
                began = time.monotonic()
                text = _call("read the job's log", lambda: self._client.get_job_logs(job_id), UNREACHABLE_S)
                due = time.monotonic() + rest_s(time.monotonic() - began)
                log.take(str(text), final=status.is_terminal())
            if log.is_done:
                return JobEnd("SUCCEEDED")
            if status == "FAILED":
                info = _call("read why the job failed", lambda: self._client.get_job_info(job_id), UNREACHABLE_S)
                return JobEnd("FAILED", f"with exit code {info.driver_exit_code}", info.message or "")
            if status.is_terminal():
                return JobEnd("SUCCEEDED" if status == "SUCCEEDED" else "STOPPED")
            if time.monotonic() > deadline:
                self.stop(job_id)
                raise JobError(f"Ray job {job_id} ran past ray.timeout_s = {job.timeout_s:.0f} s and was stopped")
            time.sleep(poll_s)

    def stop_now(self, job_id: str) -> None:
        _call(f"stop {job_id}", lambda: self._client.stop_job(job_id))

    def stop(self, job_id: str) -> None:
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(JobError):
            while time.monotonic() < deadline:
                if _call("read the job's status", lambda: self._client.get_job_status(job_id)).is_terminal():
                    return
                _call("stop the job", lambda: self._client.stop_job(job_id))
                time.sleep(0.2)

    def live(self) -> list[LiveJob]:
        now = time.time()
        return [
            LiveJob(
                details.submission_id,
                about["fineloop_run_id"],
                about.get("fineloop_task", ""),
                about.get("fineloop_kfp_run_id", ""),
                age_s=now - (details.start_time or now * 1000) / 1000,
                lifetime_s=float(about.get("fineloop_lifetime_s", 0)),
            )
            for details in _call("list jobs", self._client.list_jobs)
            if not details.status.is_terminal() and "fineloop_run_id" in (about := details.metadata or {})
        ]

    def spent(self) -> list[LiveJob]:
        """Empty: a cluster's list of jobs is gone with the cluster."""
        return []


def _state(status: Any) -> State:
    if not status.is_terminal():
        return "live"
    return "succeeded" if status == "SUCCEEDED" else "ended"


def _call(what: str, call: Callable[[], Any], patience_s: float = 0.0) -> Any:
    """Call the cluster, for `patience_s` while the network fails. Raises JobError: it did not answer, or refused."""
    import requests
    from ray.exceptions import AuthenticationError

    failures = (ConnectionError, requests.RequestException, RuntimeError)
    try:
        return repeated(
            call,
            lambda exc: isinstance(exc, failures) and not isinstance(exc, AuthenticationError),
            for_s=patience_s,
            every_s=1.0,
        )
    except AuthenticationError as exc:
        raise JobError(
            f"could not {what} without a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from exc
    except failures as exc:
        raise JobError(f"could not {what}: {exc}") from exc
