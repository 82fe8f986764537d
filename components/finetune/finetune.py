"""The finetune step: a dataset in, a published version of the adapter out. The work is a Ray job."""

from typing import Any

from components.shared.errors import JobError, ObjectMissing
from components.shared.ray_submit import Job, submit_and_wait
from components.shared.step import Step, config_key


def finetune(run: Step, *, dataset_uri: str) -> str:
    """Train on the dataset and return the URI of the version that the job published.

    Raises:
        FineloopError: what the job failed with.
        JobError: it ended without success and without saying why, or without a result.
    """
    store, config = run.store, run.config
    command = ("python", "-m", "ray_jobs.finetune", "--config", store.uri(config_key(run.run_id)))
    job = Job(
        run_id=run.run_id,
        task="finetune",
        command=(*command, "--run-id", run.run_id, "--dataset", dataset_uri),
        timeout_s=config.ray.timeout_s,
        metadata={"fineloop_adapter": config.adapter.name, "fineloop_config_digest": config.digest},
    )
    submission_id = submit_and_wait(job)
    try:
        result: dict[str, Any] = store.get_json(f"runs/{run.run_id}/finetune.json")
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    run.result.update(result, submission_id=submission_id)
    return str(result["version_uri"])
