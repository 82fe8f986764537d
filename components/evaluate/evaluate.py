"""The evaluate step: takes a version and returns the comparison of base, champion and candidate.

The Ray job that trained the version does the work. If that job is gone, another one takes the version as it is.
"""

from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import ROLES, Evaluation
from components.shared.errors import JobError, ObjectMissing
from components.shared.protocol import TRAINED
from components.step.step import StepRun


def evaluate(step_run: StepRun, *, dataset_uri: str, version_uri: str) -> Evaluation:
    """Measure the version on held-out records and return the result that the job wrote.

    Raises:
        FineloopError: the error that the job failed with.
        JobError: the job failed without saying why, or ended without a result.
    """
    submission_id = submit_step(step_run, "candidate", "--dataset", dataset_uri, after=TRAINED)
    try:
        evaluation = runs.read(step_run.store, step_run.run_id, Evaluation)
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    compared, wanted = evaluation.model("candidate"), version_uri.rstrip("/").rpartition("/")[2]
    if compared is None or compared.version != wanted:
        raise JobError(f"Ray job {submission_id} did not compare {wanted}, which this run has published")
    step_run.result.update(records=evaluation.records)
    return evaluation


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """All measured numbers by `<role>_<metric>`, the names by which the Kubeflow UI compares runs."""
    return {
        f"{role}_{key}": value
        for role in ROLES
        if (model := evaluation.model(role))
        for key in model.metrics
        if (value := evaluation.metric(role, key)) is not None
    }
