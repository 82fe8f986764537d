"""The evaluate step: a version in, the comparison of base, champion and candidate out. The work is a Ray job."""

from typing import Any

from components.ray_cluster.submit import submit_step
from components.registry import runs
from components.shared.errors import JobError, ObjectMissing
from components.step.step import Step

ROLES = ("base", "champion", "candidate")


def evaluate(run: Step, *, dataset_uri: str, version_uri: str) -> dict[str, Any]:
    """Measure the version on held-out records and return the run's evaluation.json.

    Its `confusion` counts references against the candidate's answers, where these are few enough to be classes.

    Raises:
        FineloopError: what the job failed with.
        JobError: it ended without success and without saying why, or without a result.
    """
    submission_id = submit_step(run, "evaluate", "--dataset", dataset_uri, "--version", version_uri)
    try:
        evaluation: dict[str, Any] = run.store.get_json(runs.run_key(run.run_id, runs.EVALUATION))
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    run.result.update(records=evaluation["records"])
    return evaluation


def flat_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Every measured number by `<role>_<metric>`, as the Kubeflow UI compares runs."""
    return {
        f"{role}_{name}": float(value)
        for role in ROLES
        for name, value in ((evaluation["models"].get(role) or {}).get("metrics") or {}).items()
        if value is not None
    }
