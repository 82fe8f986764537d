"""What the report says of a run that went on from a version."""

from dataclasses import replace
from typing import Any

import pytest

from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry.versions import Version, publish_version
from components.report.report import read_run
from components.report.run_files import sentence
from components.report.sections import headline
from components.store.store import Store
from tests.components.report.example_runs import CONFIG

NAME = CONFIG.adapter.name


def trained(
    store: Store,
    run_id: str,
    *,
    loss: float,
    parents: tuple[str, ...] = (),
    dataset: str = "d1",
    rate: float = 1e-3,
    records: int = 250,
) -> Version:
    """A version with its run's comparison."""
    start = "production" if parents else "base"
    kept = 0.5 if parents else 0.0
    train = {"learning_rate": rate, "start_from": start, "start_share": kept}
    config = {"train": train, "method": {"name": "lora"}}
    lineage = {"run_id": run_id, "config": config, "dataset": {"dataset_id": dataset}, "parents": list(parents)}
    files = {"adapter_model.safetensors": run_id.encode(), "adapter_config.json": b"{}"}
    version = publish_version(store, NAME, files, lineage=lineage)
    models = {"candidate": Measured(version=version.version, metrics={"loss": loss})}
    runs.write(store, run_id, Evaluation(run_id=run_id, dataset_id=dataset, records=records, models=models))
    return version


def sentence_of(store: Store, run_id: str) -> str:
    return sentence(read_run(CONFIG, store, run_id))


def test_what_going_on_gained_is_told_against_the_same_training_from_the_base(store: Store) -> None:
    first = trained(store, "first", loss=0.5, dataset="d0")
    afresh = trained(store, "afresh", loss=0.3)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence_of(store, "goes-on") == (
        f"It went on from {first.version}. Compared with {afresh.version}, which the same config trained from the base "
        "on the same data: 0.030 better in nats per answer token, as far as one run of each can tell."
    )
    assert sentence_of(store, "goes-on") in headline(read_run(CONFIG, store, "goes-on")).lead
    assert sentence_of(store, "afresh") == ""


@pytest.mark.parametrize(
    "other",
    [{"dataset": "d2"}, {"rate": 2e-3}, {"parents": ("s3://b/adapters/x/versions/v1",)}, {"records": 100}],
)
def test_a_training_that_differs_in_more_than_its_start_is_no_comparison(store: Store, other: dict[str, Any]) -> None:
    first = trained(store, "first", loss=0.5, dataset="d0")
    trained(store, "other", loss=0.3, **other)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence_of(store, "goes-on") == f"It went on from {first.version}."


def test_before_anything_was_measured_only_where_it_began_is_told(store: Store) -> None:
    first = trained(store, "first", loss=0.5)
    trained(store, "goes-on", loss=0.27, parents=(first.uri,))
    assert sentence(replace(read_run(CONFIG, store, "goes-on"), evaluation=None)) == f"It went on from {first.version}."
