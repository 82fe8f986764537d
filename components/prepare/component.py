"""Kubeflow step: the data becomes a dataset in the store."""

from typing import NamedTuple

from kfp import dsl

from components.step.kfp import COMPONENT


@dsl.component(**COMPONENT)
def prepare(
    config: str,
    run_id: str,
    job_id: str,
    adapter_name: str,
    data_source: str,
    method_name: str,
    learning_rate: float,
    num_workers: int,
    train_without_new_data: bool,
) -> NamedTuple("Prepared", [("config", str), ("run_id", str), ("has_news", bool), ("dataset_uri", str)]):  # type: ignore[valid-type]
    """Settle the config; read, validate, split and publish the data. A run without an id takes the Kubeflow run's."""
    from components.config.config_file import dumps
    from components.prepare.parameters import overrides
    from components.prepare.prepare import prepare_if_new
    from components.step.step import step

    changes = overrides(
        adapter_name=adapter_name,
        data_source=data_source,
        method_name=method_name,
        learning_rate=learning_rate,
        num_workers=num_workers,
        train_without_new_data=train_without_new_data,
    )
    with step("prepare", config, run_id or job_id, overrides=changes) as step_run:
        dataset = prepare_if_new(step_run)
    return (dumps(step_run.config), step_run.run_id, dataset is not None, dataset.uri if dataset else "")
