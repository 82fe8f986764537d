"""Run one entry point inside a Ray cluster through its Jobs API, and wait for it.

A step that is retried finds the job that its first attempt left behind: a running one is followed, a finished one is
taken as it is, and only a failed or stopped one is run again, under the next number. The job's log is copied to stdout.
Token authentication is Ray's own: RAY_AUTH_MODE=token, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
"""

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, TextIO, TypeVar

from components.shared.errors import JobError, UserError
from components.shared.step import Step, config_key, find_failure

logger = logging.getLogger(__name__)

T = TypeVar("T")
UNREACHABLE_S = 30.0
"""How long the cluster may be out of reach in the middle of a job before the step gives up on it."""
STOP_S = 10.0
"""How long a stopped job may take to end."""
LAST_LINES = 8
_RAY_VARIABLE = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True)
class Job:
    """An entry point, and the run and task that it is an attempt at."""

    run_id: str
    task: str
    command: tuple[str, ...]
    timeout_s: float
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the ids of all its attempts begin with."""
        return f"fineloop-{self.run_id}-{self.task}"


def submit_and_wait(job: Job, *, address: str = "", output: TextIO | None = None, poll_s: float = 0.5) -> str:
    """Submit the job, or follow the attempt that exists, until it succeeds; returns its submission id.

    SIGTERM and SIGINT stop the job before they end this process.

    Args:
        address: URL of the Jobs API; empty means the environment's RAY_ADDRESS.
        output: where the job's log goes; None means stdout.

    Raises:
        FineloopError: the job printed a failure; the error is of the class that it names.
        JobError: it failed without saying why, was stopped, ran past its deadline, or the cluster is out of reach.
        UserError: there is no address, or it is not a URL.
    """
    client = _connect(address or os.environ.get("RAY_ADDRESS", ""))
    submission_id, exists = _attempt(client, job)
    with _stopped_by_signals(client, submission_id):
        if not exists:
            _submit(client, job, submission_id)
        else:
            logger.info("Ray job %s is there from an earlier attempt: following it", submission_id)
        status, log = _follow(client, job, submission_id, output or sys.stdout, poll_s)
    if status != "SUCCEEDED":
        raise _error(client, submission_id, status, log)
    return submission_id


def submit_step(run: Step, task: str, *arguments: str) -> str:
    """Run `python -m ray_jobs.<task>` for a pipeline's step, with its config and run id; returns its submission id.

    Raises:
        FineloopError: as for `submit_and_wait`.
    """
    config = run.config
    command = ("python", "-m", f"ray_jobs.{task}", "--config", run.store.uri(config_key(run.run_id)))
    job = Job(
        run_id=run.run_id,
        task=task,
        command=(*command, "--run-id", run.run_id, *arguments),
        timeout_s=config.ray.timeout_s,
        metadata={"fineloop_adapter": config.adapter.name, "fineloop_config_digest": config.digest},
    )
    submission_id = submit_and_wait(job)
    run.result.update(submission_id=submission_id)
    return submission_id


def stop_run(run_id: str, *, address: str = "") -> list[str]:
    """Stop every job of a run that still runs; returns their ids.

    Raises:
        JobError: the cluster is out of reach.
    """
    client = _connect(address or os.environ.get("RAY_ADDRESS", ""))
    jobs = _call("list jobs", client.list_jobs)
    live = [j.submission_id for j in jobs if j.metadata.get("fineloop_run_id") == run_id and not j.status.is_terminal()]
    for submission_id in live:
        _call(f"stop {submission_id}", partial(client.stop_job, submission_id))
    return live


def _connect(address: str) -> Any:
    if not address:
        raise UserError("RAY_ADDRESS is not set: set it to a cluster's Jobs API, such as http://HOST:8265")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"RAY_ADDRESS {address!r} is not the URL of a Jobs API, such as http://HOST:8265")
    from ray.job_submission import JobSubmissionClient  # half a second

    # Ray lets its variables win over the argument.
    before = os.environ.get(_RAY_VARIABLE)
    os.environ[_RAY_VARIABLE] = address
    try:
        return _call(f"connect to {address}", lambda: JobSubmissionClient(address))
    finally:
        if before is None:
            del os.environ[_RAY_VARIABLE]
        else:
            os.environ[_RAY_VARIABLE] = before


def _attempt(client: Any, job: Job) -> tuple[str, bool]:
    """The newest attempt's id and True when it runs or succeeded, else the next id and False."""
    pattern = re.compile(re.escape(job.name) + r"-(\d+)")
    attempts = {
        int(match[1]): found
        for found in _call("list jobs", client.list_jobs)
        if (match := pattern.fullmatch(found.submission_id or ""))
    }
    newest = max(attempts, default=0)
    if newest and attempts[newest].status not in ("FAILED", "STOPPED"):
        return f"{job.name}-{newest}", True
    return f"{job.name}-{newest + 1}", False


def _submit(client: Any, job: Job, submission_id: str) -> None:
    metadata = {"fineloop_run_id": job.run_id, "fineloop_task": job.task, **job.metadata}
    entrypoint = shlex.join(job.command)
    deadline = time.monotonic() + UNREACHABLE_S

    def submit() -> None:
        while True:
            try:
                client.submit_job(entrypoint=entrypoint, submission_id=submission_id, metadata=metadata)
                return
            except RuntimeError as exc:
                # A head answers before the agent that starts jobs has registered. Other refusals are final: a job that
                # was accepted after all would be refused as a duplicate.
                if "No available agent" not in str(exc) or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    _call(f"submit {submission_id}", submit)


def _follow(client: Any, job: Job, submission_id: str, output: TextIO, poll_s: float) -> tuple[str, str]:
    """Copy the log, whole lines at a time, until the job ends; its status and log."""
    deadline = time.monotonic() + job.timeout_s
    copied = 0
    while True:
        status = _call("read the job's status", lambda: client.get_job_status(submission_id), UNREACHABLE_S)
        log: str = _call("read the job's log", lambda: client.get_job_logs(submission_id), UNREACHABLE_S)
        end = len(log) if status.is_terminal() else log.rfind("\n") + 1
        if end > copied:
            output.write(log[copied:end])
            output.flush()
            copied = end
        if status.is_terminal():
            if log and not log.endswith("\n"):
                output.write("\n")
            return str(status.value), log
        if time.monotonic() > deadline:
            _stop(client, submission_id)
            raise JobError(f"Ray job {submission_id} ran past ray.timeout_s = {job.timeout_s:.0f} s and was stopped")
        time.sleep(poll_s)


def _error(client: Any, submission_id: str, status: str, log: str) -> Exception:
    failure = find_failure(log)
    if failure is not None:
        return failure.as_error()
    if status == "STOPPED":
        return JobError(f"Ray job {submission_id} was stopped by someone else")
    info = _call("read why the job failed", lambda: client.get_job_info(submission_id), UNREACHABLE_S)
    last = "\n  ".join([line for line in log.splitlines() if line.strip()][-LAST_LINES:])
    why = last or info.message or "it printed nothing"
    return JobError(f"Ray job {submission_id} failed with exit code {info.driver_exit_code}; its last lines:\n  {why}")


@contextlib.contextmanager
def _stopped_by_signals(client: Any, submission_id: str) -> Iterator[None]:
    """On SIGTERM or SIGINT stop the job in one call, because a cancelled Kubeflow step has about a second."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):  # what matters now is to end; the caller's way out tries again
            client.stop_job(submission_id)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _stop(client, submission_id)  # a submission that was under way came to be after the first call
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(client: Any, submission_id: str) -> None:
    """Stop the job and see it end, as far as the cluster lets us."""
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(JobError):
        while time.monotonic() < deadline:
            if _call("read the job's status", lambda: client.get_job_status(submission_id)).is_terminal():
                return
            _call("stop the job", lambda: client.stop_job(submission_id))
            time.sleep(0.2)


def _call(what: str, call: Callable[[], T], patience_s: float = 0.0) -> T:
    """Ask the cluster; a network that fails is asked again for `patience_s`.

    Raises:
        JobError: it did not answer, or refused.
    """
    import requests  # type: ignore[import-untyped]
    from ray.exceptions import AuthenticationError

    deadline = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except AuthenticationError as exc:
            raise JobError(
                f"could not {what} without a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            ) from exc
        except (ConnectionError, requests.RequestException, RuntimeError) as exc:
            if time.monotonic() >= deadline:
                raise JobError(f"could not {what}: {exc}") from exc
            time.sleep(1.0)
