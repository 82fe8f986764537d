"""Kubeflow steps: the data becomes a dataset in the store, all of it or what came since."""

from typing import Any, NamedTuple

from kfp import dsl

from components.step.step import COMPONENT


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
) -> NamedTuple(  # type: ignore[valid-type]
    "Prepared",
    [("run_uri", str), ("config_digest", str), ("Output", bool), ("dataset_uri", str), ("dataset_sha256", str)],
):
    """Settle the config; read, validate, split and publish the data. A run without an id takes the Kubeflow run's.

    Output: whether the data is new. A condition reads it, and kfp.local knows the outputs of that name alone there.
    """
    from components.prepare.by_engine import prepared
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
    found = (dataset.uri, dataset.manifest_sha256) if dataset else ("", "")
    return (step_run.run_uri, step_run.config.digest, dataset is not None, *found)


@dsl.component(**COMPONENT)
def newer(run_uri: str, config_digest: str) -> str:
    """Publish the records that came since production and what it is compared with were trained; returns their URI."""
    from components.prepare.newer import publish_newer
    from components.step.step import step

    with step("newer", run_uri, config_digest) as step_run:
        dataset_uri = publish_newer(step_run)
    return dataset_uri
