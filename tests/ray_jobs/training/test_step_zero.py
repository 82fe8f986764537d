"""A sharding that is really broken must stop the training before its first step."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from components.config import config_file
from components.config.schema import RunConfig
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.text.batching import IGNORED
from ray_jobs.training import step_zero, zero
from tests.models.splits import split_of
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group, train_in_rank
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(32)


def train_with_a_broken_shard(config_toml: str) -> None:
    """One worker's part of one matrix is turned around after DeepSpeed has set everything up."""
    initialize = zero.initialize

    def break_one(model: torch.nn.Module, config: RunConfig, dtype: torch.dtype) -> Any:
        engine = initialize(model, config, dtype)
        if dist.get_rank() == 1:
            weight = engine.module.get_parameter("base_model.model.model.layers.1.mlp.down_proj.base_layer.weight")
            part = weight.ds_tensor if config.train.zero_stage == 3 else weight.data
            part.copy_(part.flatten().flip(0).view(part.shape))
        return engine

    with mock.patch.object(zero, "initialize", break_one):
        train_in_rank({"broken": config_toml}, ROWS)


@pytest.mark.parametrize(
    ("zero_stage", "base_format"),
    [(2, "nf4"), (3, "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, "bf16"), (3, "nf4")))],
)
def test_one_broken_part_stops_the_training_with_both_losses(
    config: RunConfig, store: Store, tmp_path: Path, base_format, zero_stage
):
    changes = [f"method.base={base_format}", f"train.zero_stage={zero_stage}"]
    toml = config_file.dumps(in_store(config, store, *changes))
    with pytest.raises(RuntimeError) as raised:
        in_group(train_with_a_broken_shard, toml, directory=tmp_path, num_workers=2)
    found = re.search(
        rf"JobError: before the first step, rank (\d)'s loss with train\.zero_stage={zero_stage} is (\S+) and that of "
        r"the same model unsharded is (\S+)\. Of \d+ answer tokens the losses are (\S+) apart on average, and rounding "
        r"explains up to (\S+):",
        str(raised.value),
    )
    assert found, str(raised.value)
    rank, sharded, plain, apart, limit = int(found[1]), *map(float, found.groups()[1:])
    assert sharded != plain
    assert apart > limit > 0
    if zero_stage == 2:  # every worker has weights of its own; under ZeRO-3 all see the broken part
        assert rank == 1


def test_the_loss_of_a_base_is_read_from_its_files_once_for_the_same_records(config, store, monkeypatch):
    base = base_model.resolve(config.model)
    ids = torch.arange(24).reshape(2, 12)
    probe = {"input_ids": ids, "labels": ids}
    plain = step_zero.base_nll(config, base, probe, PLAIN, torch.bfloat16)
    assert step_zero.known_base_nll(store, config, base, probe, PLAIN).equal(plain)

    measured, other = list[str](), torch.tensor([1.5])
    monkeypatch.setattr(step_zero, "base_nll", lambda config, *_: measured.append(config.method.row.base) or other)
    assert step_zero.known_base_nll(store, config, base, probe, PLAIN).equal(plain)
    assert measured == []
    nf4 = config.model_copy(update={"method": config.method.model_copy(update={"base": "nf4"})})
    other_base = replace(base, identity={"kind": "folder", "sha256": "0"})
    other_probe = {"input_ids": ids, "labels": ids.flip(0)}
    for changed in (
        (nf4, base, probe, PLAIN),
        (config, other_base, probe, PLAIN),
        (config, base, other_probe, PLAIN),
        (config, base, probe, Kernels("float32")),
    ):
        assert step_zero.known_base_nll(store, *changed).tolist() == [1.5]
    assert measured == ["nf4", "bf16", "bf16", "bf16"]

    for info in list(store.list(step_zero.KNOWN)):
        store.put(info.key, b"{}")
    assert step_zero.known_base_nll(store, config, base, probe, PLAIN).tolist() == [1.5]


@pytest.mark.parametrize(
    ("lengths", "answers", "taken"),
    [
        ([*range(30, 60)], 25, 8),  # 200 answer tokens
        ([*range(30, 60)], 2, 14),  # 512 tokens in all
        ([300] * 30, 2, 4),
        ([300] * 3, 2, 3),
    ],
)
def test_the_shortest_records_are_compared_that_have_enough_answer_tokens(lengths, answers, taken):
    batch = step_zero.probe(split_of(*(([1] * (length - answers), [1] * answers) for length in lengths[::-1])), pad=0)
    assert batch["input_ids"].shape == (taken, sorted(lengths)[taken - 1])
    assert int((batch["labels"] != IGNORED).sum()) == taken * answers
