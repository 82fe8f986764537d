"""Kubeflow step: the data becomes a dataset in the store."""

from typing import NamedTuple

from kfp import dsl

from components.shared.step import COMPONENT


@dsl.component(**COMPONENT)
def prepare(config: str, run_id: str, job_id: str) -> NamedTuple("Prepared", [("run_id", str), ("dataset_uri", str)]):  # type: ignore[valid-type]
    """Read, validate, split and publish the data. A run without an id takes the Kubeflow run's."""
    from components.prepare.prepare import prepare as prepare_dataset
    from components.shared.step import step

    with step("prepare", config, run_id or job_id) as run:
        dataset = prepare_dataset(run.config, run.store)
        run.result.update(vars(dataset))
        run.say(f"{dataset.train_records} records to train on, {dataset.eval_records} held out")
    return (run.run_id, dataset.uri)
