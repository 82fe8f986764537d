"""Kubeflow step: the data becomes a dataset in the store."""

from dataclasses import fields
from typing import Any, NamedTuple

from kfp import dsl

from components.prepare.prepare import PreparedDataset, prepare_if_new
from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import Prepared
from components.registry.signing import require_evaluation_keys
from components.shared.errors import JobError, ObjectMissing
from components.step.step import COMPONENT, StepRun


@dsl.component(**COMPONENT)
def prepare(
    config: dict[str, Any],
    run_id: str,
    job_id: str,
    adapter_name: str,
    base_model: str,
    data_source: str,
    method_name: str,
    rank: int,
    learning_rate: float,
    epochs: int,
    num_workers: int,
    train_without_new_data: bool,
    is_decided: bool = False,
) -> NamedTuple("Prepared", [("run_uri", str), ("config_digest", str), ("Output", bool), ("dataset_uri", str)]):  # type: ignore[valid-type]
    """Settle the config; read, validate, split and publish the data. A run without an id takes the Kubeflow run's.

    Output: whether the data is new. A condition reads it, and kfp.local knows the outputs of that name alone there.
    """
    from components.prepare.component import prepared  # kfp runs this function apart from its module
    from components.prepare.prepare import overrides
    from components.step.step import first_step

    changes = overrides(
        adapter_name=adapter_name,
        base_model=base_model,
        data_source=data_source,
        method_name=method_name,
        rank=rank,
        learning_rate=learning_rate,
        epochs=epochs,
        num_workers=num_workers,
        train_without_new_data=train_without_new_data,
    )
    with first_step("prepare", config, run_id or job_id, overrides=changes) as step_run:
        dataset = prepared(step_run, is_decided=is_decided)
    return (step_run.run_uri, step_run.config.digest, dataset is not None, dataset.uri if dataset else "")


# Runs the prepare step where `data.engine` says: in this process, or in a Ray job that asks for no GPU.


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
    ray = config.ray.for_data(timeout_s=config.data.timeout_s)
    submission_id = submit_step(
        step_run, "prepare", *decided, ray=ray, deadline_key="data.timeout_s", asks_by="ray.cluster.data"
    )
    try:
        result = runs.read(step_run.store, step_run.run_id, Prepared).result
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    step_run.result.update(result)
    if "skipped" in result:
        return None
    return PreparedDataset(**{field.name: result[field.name] for field in fields(PreparedDataset)})
