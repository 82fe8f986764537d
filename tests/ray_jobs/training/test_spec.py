"""What travels to the workers of a training, and the base that an attempt goes on with."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.registry import lineage
from components.shared.errors import IntegrityError
from ray_jobs import finetune
from ray_jobs.base import base_model
from ray_jobs.training import checkpoint
from ray_jobs.training.spec import Stopwatch, TrainSpec
from tests.doubles import datasets
from tests.models.bases import rewritten
from tests.models.spec import changed, spec_of
from tests.models.tiny import colour_rows
from tests.models.train_group import train
from tests.ray_jobs.training.in_store import in_store

ROOT = Path(__file__).parents[3]


def test_parts_follow_each_other_through_the_processes_of_a_training():
    with mock.patch("time.time", side_effect=[1002.5, 1003.0]):
        watch = Stopwatch(1000.0)
        watch.lap("data")
        arrived: Stopwatch = pickle.loads(pickle.dumps(watch))  # noqa: S301 - our own
        arrived.lap("workers start")
    assert [(each.part, each.seconds) for each in arrived.parts] == [("data", 2.5), ("workers start", 0.5)]
    assert arrived.began_at == "1970-01-01T00:16:40+00:00"


@pytest.mark.parametrize("num_workers", ["2", "[1, 2]"])
def test_workers_read_what_the_driver_resolved_and_their_number_changes_no_digest(config, num_workers: str) -> None:
    config = changed(config, f"ray.num_workers={num_workers}", "train.micro_batch_size=1")
    spec = spec_of(config, started=lineage.Started(user="me"), flops_before=None)
    arrived = TrainSpec.model_validate_json(spec.model_dump_json())
    assert arrived == spec
    assert arrived.learning_rate == config.learning_rate
    assert arrived.on(2).training_digest == config.training_digest == config.on(2).training_digest
    assert arrived.asked.config == config.model_dump(mode="json")


def test_whoever_reads_a_job_without_training_waits_for_no_model_code():
    check = "import sys, ray_jobs.training.trainer as _; print(*{'torch', 'transformers', 'peft'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_base_that_changed_between_two_attempts_is_refused_before_any_worker(config, store, tmp_path, monkeypatch):
    base = shutil.copytree(config.model.base, tmp_path / "base")
    config = in_store(config, store, f"model.base={base}", "train.checkpoint_every_steps=2")
    monkeypatch.setenv("STOP_AFTER_STEP", "3")
    with pytest.raises(RuntimeError):
        train(config_file.dumps(config), colour_rows(64), tmp_path / "run", run_id="mine", num_workers=1)
    assert checkpoint.newest(store, "mine").base == base_model.resolve(config.model).identity

    with rewritten(base) as weights:
        weights["model.norm.weight"] += 1
    records = [Record(str(place), [Message("user", "sky")], "blue") for place in range(4)]
    data = datasets.publish(store, train=records[1:], evaluation=records[:1])
    with pytest.raises(IntegrityError, match="put the files that it was trained on back there"):
        finetune.run(config, run_id="mine", dataset_uri=data.uri)
