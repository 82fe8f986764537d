"""An attempt that goes on from a checkpoint does so on the base of that checkpoint, or not at all."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.shared.errors import IntegrityError
from ray_jobs import finetune
from ray_jobs.base import base_model
from ray_jobs.training import checkpoint
from tests.doubles import datasets
from tests.models.tiny import colour_rows
from tests.models.train_group import train


def test_a_base_that_changed_between_two_attempts_is_refused_before_any_worker(config, store, tmp_path, monkeypatch):
    base = shutil.copytree(config.model.base, tmp_path / "base")
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", f"model.base={base}"]
    config = config_file.loads(config_file.dumps(config), [*place, "train.checkpoint_every_steps=2"])
    monkeypatch.setenv("STOP_AFTER_STEP", "3")
    with pytest.raises(RuntimeError):
        train(config_file.dumps(config), colour_rows(64), tmp_path / "run", run_id="mine", num_workers=1)
    progress = checkpoint.newest(store, "mine")
    assert progress is not None
    assert progress.base == base_model.resolve(config.model).identity

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += torch.ones(1, dtype=weights["model.norm.weight"].dtype)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    records = [Record(str(place), [Message("user", "sky")], "blue") for place in range(4)]
    data = datasets.publish(store, train=records[1:], evaluation=records[:1])
    with pytest.raises(IntegrityError, match="put the files that it was trained on back there"):
        finetune.finetune(config, run_id="mine", dataset_uri=data.uri)
