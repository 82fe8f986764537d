"""Ray jobs that no step waits for any more: a Kubeflow run that is terminated has hardly time to stop its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from components.ray_cluster.backend import Backend, LiveJob
from components.shared.errors import FineloopError, KubeflowError
from pipelines.kubeflow.client import Kubeflow
from pipelines.kubeflow.runs import OVER, STOPPED, state_of

GRACE_S = 120.0
"""A run that ended by itself leaves its job to its step, which stops it a little before."""
UNKNOWN_S = 3600.0
"""A run that was started by the clock is unknown to the server until Kubeflow's persistence agent reports its workflow
(2.17, apiserver/resource/resource_manager.go, ReportWorkflowResource), and the agent may be away for a while."""

StateOf = Callable[[str], str | None]
"""The state of a Kubeflow run, None when there is no such run; raises KubeflowError when it cannot be asked."""


@dataclass(frozen=True)
class Verdict:
    """Whether a job is to be stopped, and why."""

    job: LiveJob
    is_orphan: bool
    why: str

    def as_json(self) -> dict[str, Any]:
        about = {key: getattr(self.job, key) for key in ("job_id", "run_id", "task", "kfp_run_id")}
        return {**about, "age_s": round(self.job.age_s), "why": self.why}


def judge(job: LiveJob, state_of: StateOf) -> Verdict:
    """A job is an orphan when it is past its lifetime, or its Kubeflow run was stopped, is over or is gone.

    In doubt it is kept; that of a run that a person stopped has no grace, however its step does.
    """
    if job.lifetime_s and job.age_s > job.lifetime_s + GRACE_S:
        return Verdict(job, True, f"it is {job.age_s:.0f} s old, and its step waits at most {job.lifetime_s:.0f} s")
    if not job.kfp_run_id:
        return Verdict(job, False, "it was not started by Kubeflow")
    try:
        state = state_of(job.kfp_run_id)
    except KubeflowError as exc:
        return Verdict(job, False, f"its Kubeflow run cannot be asked for: {exc}")
    if state in STOPPED:
        return Verdict(job, True, f"its Kubeflow run is {state.lower()}")
    if state is not None and state not in OVER:
        return Verdict(job, False, f"its Kubeflow run is {state.lower()}")
    if job.age_s < (GRACE_S if state else UNKNOWN_S):
        return Verdict(job, False, f"it is only {job.age_s:.0f} s old")
    return Verdict(job, True, f"its Kubeflow run is {state.lower() if state else 'gone'}")


def reap(
    backends: Mapping[str, Callable[[], Backend]], state_of: StateOf, *, dry_run: bool
) -> tuple[list[Verdict], list[str]]:
    """Judge every job of ours that lives or is left, and unless `dry_run` end the orphans.

    Returns:
        The verdicts on what was seen, and for each failure a line that names the backend: it hinders no other.
    """
    verdicts, failures = list[Verdict](), list[str]()
    for name, connect_to in backends.items():
        try:
            backend = connect_to()
            judged = [judge(job, state_of) for job in backend.live()]
            spent = "it ended long ago, and no workflow has it deleted"
            judged += [Verdict(job, True, spent) for job in backend.spent()]
        except FineloopError as exc:
            failures.append(f"{name}: {exc}")
            continue
        for verdict in judged:
            try:
                if verdict.is_orphan and not dry_run:
                    backend.stop_now(verdict.job.job_id)
                verdicts.append(verdict)
            except FineloopError as exc:
                failures.append(f"{name}: {exc}")
                verdicts.append(replace(verdict, is_orphan=False, why=f"{verdict.why}, but it could not be stopped"))
    return verdicts, failures


def state_on(connect: Callable[[], Kubeflow]) -> StateOf:
    """Ask a server, which is connected to when the first job needs it."""
    import kfp_server_api

    server = cache(connect)

    def ask(run_id: str) -> str | None:
        kubeflow = server()
        with kubeflow.asking(f"show run {run_id}"):
            try:
                return state_of(kubeflow.client.get_run(run_id))
            except kfp_server_api.ApiException as exc:
                if exc.status == 404:
                    return None
                raise

    return ask
