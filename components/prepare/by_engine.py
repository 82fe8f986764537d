"""Runs the prepare step where `data.engine` says: in this process, or in a Ray job that asks for no GPU."""

from dataclasses import fields

from components.prepare.prepare import PreparedDataset, prepare_if_new
from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import Prepared
from components.registry.signing import require_evaluation_keys
from components.step.step import StepRun


def prepared(step_run: StepRun, *, is_decided: bool = False) -> PreparedDataset | None:
    """Run `prepare_if_new` here or in a Ray job, and return its result.

    Raises:
        FineloopError: as for `prepare_if_new`; for a job, the error that it failed with.
        ConfigError: a gate decides at the end, and could believe no evaluation.
        JobError: the job failed without saying why, or ended without a result.
    """
    if is_decided:
        require_evaluation_keys(step_run.store)
    config = step_run.config
    if config.data.engine == "local":
        return prepare_if_new(step_run, is_decided=is_decided)
    decided = ["--decided"] if is_decided else []
    job_id = submit_step(step_run, "prepare", *decided, ray=config.ray.for_data())
    result = runs.left_by(job_id, step_run.store, step_run.run_id, Prepared).result
    step_run.result.update(result)
    if "skipped" in result:
        return None
    return PreparedDataset(
        **{field.name: result[field.name] for field in fields(PreparedDataset) if field.name in result}
    )
