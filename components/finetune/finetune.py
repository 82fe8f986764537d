"""The finetune step: a dataset in, a published version of the adapter out. The work is a Ray job."""

from components.ray_cluster.submit import submit_step
from components.registry import runs
from components.registry.records import TrainResult
from components.shared.errors import JobError, ObjectMissing
from components.step.step import StepRun


def finetune(step_run: StepRun, *, dataset_uri: str) -> str:
    """Train on the dataset and return the URI of the version that the job published.

    Raises:
        FineloopError: what the job failed with.
        JobError: it ended without success and without saying why, or without a result.
    """
    submission_id = submit_step(step_run, "finetune", "--dataset", dataset_uri)
    try:
        result = runs.read(step_run.store, step_run.run_id, TrainResult)
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    step_run.result.update(result.model_dump(mode="json", exclude={"format"}))
    return result.version_uri
