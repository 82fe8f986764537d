"""When a run sweeps, and at what rate it then trains."""

from dataclasses import replace

import pytest

from components.config import config_file
from components.finetune.finetune import finetune
from components.prepare.dataset import Message, Record
from components.records import runs
from components.records.sweep import RateLoss, SweepResult, Tuned, TunedRate
from components.registry import between_runs
from components.registry.between_runs import FoundRate, erase
from components.shared.errors import ConfigError, DataError
from components.step.step import StepRun
from components.store import folders
from components.tune import tune as step_file
from components.tune.tune import is_due, tune
from tests.doubles import datasets

CONFIG = """
[adapter]
name = "colours"
[model]
base = "org/base"
[data]
source = "s3://data/colours/"
[train]
learning_rate = 1e-3
"""
FOUND = FoundRate(
    learning_rate=3e-3, loss=1.0, is_inside=True, method="qlora", run_id="before", dataset_id="d1", base="org/base",
    rank=16, batch_size=16, train_records=5_000,
)  # fmt: skip


def config(*overrides):
    return config_file.loads(CONFIG, overrides)


@pytest.mark.parametrize(
    ("when", "found", "dataset_id", "due"),
    [
        ("never", None, "d1", False),
        ("always", FOUND, "d1", True),
        ("no_prior_sweep", None, "d1", True),
        ("no_prior_sweep", FOUND, "d2", False),
        ("data_changed", None, "d1", True),
        ("data_changed", FOUND, "d1", False),
        ("data_changed", FOUND, "d2", True),
    ],
)
def test_a_sweep_is_due_when_the_config_says_so(when, found, dataset_id, due):
    assert is_due(when, found, dataset_id) is due


def test_a_rate_is_remembered_for_the_recipe_and_the_data_source_and_for_no_other(store):
    between_runs.remember_rate(store, config(), FOUND)
    assert between_runs.recall_rate(store, config()) == FOUND
    # The rate itself, the night's number of records and the gate change nothing that it depends on.
    same = ("train.learning_rate=1e-4", "data.max_records=100", "gate.better_than_base_by=0.1", "tune.when=always")
    assert between_runs.recall_rate(store, config(*same)) == FOUND
    for other in (
        *("adapter.name=shapes", "model.base=org/other", "data.source=s3://data/shapes/", "method.name=lora"),
        *("method.rank=8", "train.batch_size=32", "method.target_modules=['q_proj']"),
    ):
        assert between_runs.recall_rate(store, config(other)) is None, other


@pytest.fixture
def swept(store, monkeypatch):
    """Run the step; the sweep is a stand-in that finds 3e-3 and counts how often it ran."""
    ran = []

    def submit(step_run, task, *arguments):
        ran.append((task, *arguments))
        best = Tuned(
            method="qlora", rank=16, batch_size=16, prior=1e-3, learning_rate=3e-3, loss=1.0, is_inside=True,
            rates=[RateLoss(learning_rate=3e-3, loss=1.0, statuses=["finished"])],
        )  # fmt: skip
        result = SweepResult(
            run_id=step_run.run_id, adapter="colours", base={}, dataset={"dataset_id": "d1"}, config_sha256="",
            environment={}, records=1, start_loss=2.0, best=best, tuned=[best], verdict="", advised_method="qlora",
            trials=[],
        )  # fmt: skip
        runs.write(store, step_run.run_id, result)
        return "job"

    monkeypatch.setattr(step_file, "submit_step", submit)
    for dataset_id, records in (("d1", 5_000), ("d2", 395_000)):
        about = {"dataset_id": dataset_id, "train_records": records}
        folders.publish(store, f"datasets/{dataset_id}", {"x": b"x"}, about=about)

    def step(run_id, *overrides, dataset="d1"):
        step_run = StepRun("tune", run_id, config(*overrides), store)
        return tune(step_run, dataset_uri=store.uri(f"datasets/{dataset}")), runs.read(store, run_id, TunedRate)

    step.ran = ran
    return step


def test_the_first_run_sweeps_and_the_next_trains_at_what_it_found_on_other_data_too(swept):
    for run_id, dataset in (("first", "d1"), ("second", "d2")):
        rate, written = swept(run_id, "tune.when=no_prior_sweep", dataset=dataset)
        assert (rate, written.learning_rate, written.prior, written.sweep_run_id) == (3e-3, 3e-3, 1e-3, "first")
    assert len(swept.ran) == 1
    assert swept.ran[0][0] == "sweep"


def test_a_method_that_the_sweep_leaves_out_trains_at_its_own_rate(swept):
    rate, written = swept("none", "tune.when=always", "tune.methods=['lora', 'dora']", "method.name=lora")
    assert (rate, written.learning_rate, written.sweep_run_id) == (1e-3, 1e-3, None)


def test_a_pipeline_without_the_step_does_not_train_at_an_untuned_rate_in_silence(store):
    step_run = StepRun("finetune", "first", config("tune.when=always"), store)
    with pytest.raises(ConfigError, match=r"tune\.when is always, and this pipeline was made without the step"):
        finetune(step_run, dataset_uri=store.uri("datasets/d1"))


@pytest.mark.parametrize("step", [finetune, tune])
def test_a_dataset_with_an_erased_record_is_refused_before_the_cluster_is_asked(step, store):
    record = Record("r", [Message("user", "q")], "a")
    uri = datasets.publish(store, train=[record], evaluation=[replace(record, id="e")]).uri
    erase(store, "r", by="ann")
    step_run = StepRun("finetune", "first", config(), store)
    with pytest.raises(DataError, match="holds 1 record that was erased after it was made"):
        step(step_run, dataset_uri=uri)
