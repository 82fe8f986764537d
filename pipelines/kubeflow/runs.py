"""Lists, finds and stops runs on Kubeflow."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import kfp_server_api

from components.shared.errors import KubeflowError, UserError
from pipelines.kubeflow.client import Kubeflow, one_of
from pipelines.kubeflow.run import LIVE, Run, Specs

NEWEST_FIRST = "created_at desc"
NUM_SEARCHED = 1000
STOP_S = 180.0
SERVER_STATES = {"CANCELED": ["CANCELED", "FAILED"]}
"""The server's states for a state of `Run.state`, if they differ."""


def get(kubeflow: Kubeflow, run_id: str) -> Run:
    """Fetch the run with this id, including its steps."""
    with kubeflow.asking(f"show run {run_id}"):
        detail = kubeflow.client.get_run(run_id)
    return Run(kubeflow, detail, Specs(kubeflow).of(detail))


def find(kubeflow: Kubeflow, reference: str) -> Run:
    """Find a run by its id, the first digits of its id, or its name; of several with the same name, the newest.

    Raises:
        UserError: there is none, or the digits match several.
    """
    seen = list(itertools.islice(_details(kubeflow), NUM_SEARCHED))
    named = [detail for detail in seen if reference in (detail.run_id, detail.display_name)][:1]
    found = named or [detail for detail in seen if detail.run_id.startswith(reference)]
    if len(found) > 1:
        raise UserError(f"run {reference!r} fits {len(found)} runs: give more digits of its id")
    if not found and len(seen) < NUM_SEARCHED:
        raise UserError(f"{kubeflow.host} has no run {reference!r}: see `fineloop runs list`")
    return get(kubeflow, found[0].run_id if found else reference)


def listed(
    kubeflow: Kubeflow, *, experiment: str = "", state: str = "", adapter: str = "", limit: int = 20
) -> list[Run]:
    """Return the newest runs that match, at most `limit`.

    Raises:
        UserError: there is no such experiment.
    """
    chosen: dict[str, Any] = {}
    if experiment:
        chosen["experiment_id"] = _experiment_id(kubeflow, experiment)
    wanted = state.upper()
    if wanted:
        chosen["filter"] = one_of("state", *SERVER_STATES.get(wanted, [wanted]))
    specs = Specs(kubeflow)
    runs = (Run(kubeflow, detail, specs.of(detail)) for detail in _details(kubeflow, **chosen))
    fits = (run for run in runs if run.is_ours and adapter in ("", run.config.adapter) and wanted in ("", run.state))
    return list(itertools.islice(fits, limit))


def of_schedule(kubeflow: Kubeflow, recurring_run_ids: Sequence[str]) -> list[Any]:
    """Return kfp's records of the live runs that these recurring runs have started."""
    live = _details(kubeflow, filter=one_of("state", *LIVE))
    return [detail for detail in live if detail.recurring_run_id in recurring_run_ids]


def stop(
    kubeflow: Kubeflow,
    run: Run,
    *,
    then: Callable[[], None] = lambda: None,
    timeout_s: float = STOP_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Terminate a run and wait until it is over; a run that is over stays as it is.

    A run that is already being stopped is awaited. `then` is called when the run is being stopped, and again when
    it is over, because a step may have started a job in between.

    Raises:
        KubeflowError: it is not over after `timeout_s` seconds.
    """
    if run.is_over:
        then()
        return run
    with kubeflow.asking(f"stop run {run.run_id}"):
        try:
            kubeflow.client.terminate_run(run.run_id)
        except kfp_server_api.ApiException as exc:
            # The server answers 400 for a run that is being terminated, or that has just ended.
            if exc.status != 400 or get(kubeflow, run.run_id).state in ("PENDING", "RUNNING", "PAUSED"):
                raise
    then()
    deadline = time.monotonic() + timeout_s
    while not (now := get(kubeflow, run.run_id)).is_over:
        if time.monotonic() > deadline:
            raise KubeflowError(
                f"run {run.run_id} is still {now.state} after {timeout_s:.0f} s: see {run.url}, "
                "and `kubectl get workflows` in its namespace"
            )
        sleep(0.5)
    then()
    return now


def _details(kubeflow: Kubeflow, **chosen: Any) -> Iterator[Any]:
    namespace = {} if "experiment_id" in chosen else {"namespace": kubeflow.namespace or None}
    return kubeflow.listed("runs", kubeflow.client.list_runs, "runs", sort_by=NEWEST_FIRST, **namespace, **chosen)


def _experiment_id(kubeflow: Kubeflow, name: str) -> str:
    namespace = kubeflow.namespace or None
    experiments = kubeflow.client.list_experiments
    experiment_id = kubeflow.id_of("experiments", name, experiments, "experiment_id", namespace=namespace)
    if not experiment_id:
        raise UserError(f"--experiment {name}: {kubeflow.host} has no such experiment")
    return experiment_id
