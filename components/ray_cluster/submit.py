"""Run one entry point on a Ray cluster and wait for it, by the same rules for every backend of `ray.cluster.kind`.

A step that is retried finds the job that its first attempt left behind: a running one is followed, a finished one is
taken as it is, and only a failed or stopped one is run again, under the next number. The job's log is copied to stdout.
"""

import contextlib
import fnmatch
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from components.config.ray import RayConfig
from components.config.schema import ModelConfig, RunConfig
from components.ray_cluster.backend import Backend, Job, JobEnd, LogCopy, kubeflow_run, last_lines
from components.ray_cluster.jobs_api import JobsApi
from components.ray_cluster.kubernetes_api import own_workflow
from components.ray_cluster.rayjob import RayJobs
from components.records import runs
from components.shared.errors import JobError, StoreError
from components.shared.machine import account, ran_low
from components.shared.protocol import find_failure
from components.step.step import StepRun
from components.store.store import open_uri

logger = logging.getLogger(__name__)

POLL_S = 0.5
LINES_OF_RAY = 80
"""Lines to search at the end of a log: more than Ray's own message about a node that ran out of memory has."""
BACKENDS: dict[str, Callable[[RayConfig], Backend]] = {
    "jobs-api": lambda _: JobsApi(os.environ.get("RAY_ADDRESS", "")),
    "rayjob": RayJobs,
}


def submit_and_wait(
    job: Job, ray: RayConfig | None = None, *, output: TextIO | None = None, after: str = "", upto: str = ""
) -> str:
    """Start the job, or follow the attempt that exists, until it succeeds; returns its id on the cluster.

    In a Kubeflow step the job is stopped when its run is, and left alone when only the step's pod goes, as from a node
    that is drained: the run's next attempt at the step follows it. Elsewhere SIGTERM and SIGINT stop it.

    Without `ray` it runs on the cluster of RAY_ADDRESS. The caller's part of the job begins after the line `after` of
    its log, and ends with the line `upto`.

    Raises:
        FineloopError: the job printed a failure; the error is of the class that it names.
        JobError: it failed without saying why, was stopped, ran past its deadline, or the cluster is out of reach.
        UserError: the way to the cluster is not set, or not right.
    """
    backend = connect(ray)
    log = LogCopy(output or sys.stdout, after=after, upto=upto)
    attempts = backend.attempts(job)
    attempt = max(attempts, default=0)
    exists = attempt > 0 and attempts[attempt] != "ended"
    attempt += not exists
    job_id = backend.job_id(job, attempt)
    with _stopped_with_its_run(backend, job_id) as is_stopping:
        if exists:
            logger.info("%s %s exists: following it", backend.noun, job_id)
            backend.adopt(job_id)
        else:
            backend.start(job, attempt)
        ended = backend.follow(job, job_id, log, POLL_S)
    if ended.status == "STOPPED" and is_stopping.is_set():
        raise JobError(f"the run is being stopped, and {backend.noun} {job_id} with it")
    if ended.status != "SUCCEEDED":
        raise _error(f"{backend.noun} {job_id}", ended, log.text)
    return job_id


def submit_step(
    step_run: StepRun, task: str, *arguments: str, after: str = "", upto: str = "", ray: RayConfig | None = None
) -> str:
    """Run `python -m ray_jobs.<task>` for a pipeline's step, with its config and run id; returns the job's id.

    Steps of one task share its job, and wait for their parts of it. `ray` replaces the config's. Raises as
    `submit_and_wait`.
    """
    config, ray = step_run.config, ray or step_run.config.ray
    config_uri = step_run.store.uri(runs.run_key(step_run.run_id, runs.CONFIG))
    job = Job(
        run_id=step_run.run_id,
        task=task,
        command=("python", "-m", f"ray_jobs.{task}", "--config", config_uri, "--run-id", step_run.run_id, *arguments),
        timeout_s=ray.timeout_s,
        metadata={
            "fineloop_adapter": config.adapter.name,
            "fineloop_config_digest": config.digest,
            "fineloop_user": account(os.environ),
        },
        kfp_run_id=kubeflow_run(os.environ, step_run.run_id),
        patience_s=ray.patience_s,
    )
    job_id = submit_and_wait(job, ray, after=after, upto=upto)
    step_run.result.update(submission_id=job_id)
    return job_id


def stop_run(run_id: str, ray: RayConfig | None = None) -> list[str]:
    """Stop every job of a run that still runs; returns their ids. Raises JobError: the cluster is out of reach."""
    backend = connect(ray)
    live = [job.job_id for job in backend.live() if job.run_id == run_id]
    for job_id in live:
        backend.stop_now(job_id)
    return live


def connect(ray: RayConfig | None = None) -> Backend:
    """The backend of the cluster that the config names; without a config, that of RAY_ADDRESS. Raises UserError: it is
    not set, or not right; JobError: the cluster is out of reach."""
    ray = ray or RayConfig()
    return BACKENDS[ray.cluster.kind](ray)


def _error(name: str, ended: JobEnd, log: str) -> Exception:
    if failure := find_failure(log) or find_failure(ended.message):
        return failure
    if ended.status == "STOPPED":
        return JobError(f"{name} was stopped by someone else")
    if low := ran_low(ended.message) or ran_low(last_lines(log, LINES_OF_RAY)):
        return JobError(f"{name} failed: {low}")
    last = last_lines(log) or last_lines(ended.message) or "it printed nothing"
    return JobError(f"{name} failed {ended.why}; its last lines:\n  {last}")


@contextlib.contextmanager
def _stopped_with_its_run(backend: Backend, job_id: str) -> Iterator[threading.Event]:
    """Stop the job when the run that this process belongs to is stopped; the event is set once that begins."""
    is_stopping = threading.Event()

    def stop() -> None:
        is_stopping.set()
        logger.info("the run is being stopped: stopping %s %s", backend.noun, job_id)
        backend.stop(job_id)

    workflow = own_workflow()
    with workflow.watched(stop) if workflow else _stopped_by_signals(backend, job_id):
        yield is_stopping


@contextlib.contextmanager
def _stopped_by_signals(backend: Backend, job_id: str) -> Iterator[None]:
    """On SIGTERM or SIGINT stop the job before this process ends."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):  # what matters now is to end; the caller's way out tries again
            backend.stop_now(job_id)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        backend.stop(job_id)  # a submission that was under way may have succeeded after the first call
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Checks before a job is queued that the disk of a pod holds the base; sizes are from a listing, not a download.

WEIGHTS = "*.safetensors"
NEVER = ("*/*", "consolidated*")
"""Files of a hub's repository that no worker downloads; see ray_jobs/base/local_cache.py."""
HUB_TIMEOUT_S = 10.0


def require_disk(config: RunConfig) -> None:
    """Require that each pod's disk holds the base, where the job creates its pods. A base whose size is unknown here is
    checked by the job itself. Raises ConfigError: each of the pods would be evicted while it downloads the base."""
    if config.ray.cluster.disk_gib and (size := base_bytes(config.model)):
        config.ray.require_disk(config.model.base, size)


def base_bytes(model: ModelConfig) -> int | None:
    """The bytes that a pod downloads; None where there is no listing, or the base is neither in S3 nor on a hub."""
    if model.base.startswith("s3://"):
        store, prefix = open_uri(model.base, field="model.base")
        try:
            return sum(item.size for item in store.list(prefix.rstrip("/") + "/")) or None
        except StoreError as exc:
            logger.info("the size of model.base is not known here: %s", exc)
            return None
    if "://" in model.base or model.base.startswith((".", "/", "~")):
        return None
    try:
        from huggingface_hub import HfApi

        info = HfApi().model_info(
            model.base, revision=model.revision or None, files_metadata=True, timeout=HUB_TIMEOUT_S
        )
    except Exception as exc:  # not installed, out of reach, or refused: many types, and none has to stop a run
        logger.info("the size of model.base is not known here: %s", str(exc).partition("\n")[0])
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = fnmatch.filter(sizes, WEIGHTS)
    return sum(sizes[name] for name in weights if not any(fnmatch.fnmatch(name, pattern) for pattern in NEVER)) or None
