"""The finetune step: a dataset in, a published version of the adapter out. The work is a Ray job."""

from typing import Any

from components.ray_cluster.submit import submit_step
from components.registry import runs
from components.shared.errors import JobError, ObjectMissing
from components.step.step import Step


def finetune(run: Step, *, dataset_uri: str) -> str:
    """Train on the dataset and return the URI of the version that the job published.

    Raises:
        FineloopError: what the job failed with.
        JobError: it ended without success and without saying why, or without a result.
    """
    submission_id = submit_step(run, "finetune", "--dataset", dataset_uri)
    try:
        result: dict[str, Any] = run.store.get_json(runs.run_key(run.run_id, runs.FINETUNE))
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    run.result.update(result)
    return str(result["version_uri"])
