"""How many records are measured; and a base that a training has let go of, against one that was read for the purpose:
the same values, the same scores.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.config.gate import GateConfig
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.shared.paired import Pairs
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import BaseCache, ShardResult, further, merged, records_wanted
from ray_jobs.training import opening, publishing
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.tiny_version import RECORDS
from tests.models.train_group import fit_in_rank, in_group

Z = 1.6449 + 1.6449
"""Normal quantiles of the confidence and of the power, 95 % each."""


def pairs(gain: float, deviation: float, records: int = 300) -> Pairs:
    values = np.random.default_rng(0).standard_normal(records)
    gains = gain + deviation * (values - values.mean()) / values.std(ddof=1)
    return Pairs(1.0 - gains, np.ones(records), np.ones(records), lower_is_better=True)


@pytest.mark.parametrize("gain", [0.0, 0.01, -0.025])
def test_what_is_wanted_depends_on_how_records_differ_and_not_on_who_is_ahead(gain: float) -> None:
    """By the usual formula for a mean: (z + z)^2 variance / margin^2."""
    assert records_wanted(GateConfig(), {"champion": pairs(gain, 0.3)}) == pytest.approx((Z * 0.3 / 0.02) ** 2, abs=11)


def test_what_is_clear_beyond_doubt_wants_no_more() -> None:
    far = 3.3 * 0.3 / math.sqrt(300)
    assert records_wanted(GateConfig(), {"champion": pairs(-0.02 + far, 0.3)}) == 0
    assert records_wanted(GateConfig(), {"champion": pairs(-0.02 - far, 0.3)}) == 0
    assert records_wanted(GateConfig(), {"base": pairs(0.0, 0.3)}) == 0
    assert records_wanted(GateConfig(worse_than_champion_by=0.0), {"champion": pairs(0.0, 0.3)}) == 0


def test_the_best_version_so_far_is_asked_for_too() -> None:
    both = {"champion": pairs(1.0, 0.3), "anchor": pairs(0.0, 0.6)}
    assert records_wanted(GateConfig(), both) == pytest.approx((Z * 0.6 / 0.05) ** 2, abs=11)


def test_nothing_is_wanted_of_numbers_that_are_not_finite() -> None:
    broken = Pairs(np.array([1.0, math.nan]), np.ones(2), np.ones(2))
    assert records_wanted(GateConfig(), {"champion": broken}) == 0


def shard_of(records: list[Record], deviation: float) -> ShardResult:
    """By two workers, of which each has every second record; one record was too long for a model."""
    random = np.random.default_rng(0)
    shards = [records[start::2] for start in range(2)]
    results = [
        ShardResult(
            {record.id: 2 for record in shard if record.id != "r5"},
            {
                role: [
                    Score(2 * (1.0 + spread * value), None, record.id, {})
                    for record, value in zip(shard, random.standard_normal(len(shard)), strict=True)
                    if record.id != "r5"
                ]
                for role, spread in (("base", 0.0), ("champion", 0.0), ("candidate", deviation))
            },
            [],
            "2026-11-26T12:00:00+00:00",
            "float32",
        )
        for shard in shards
    ]
    return merged(results)


def test_more_records_are_drawn_up_to_what_tells_what_is_allowed_and_what_there_is(config) -> None:
    held_out = [Record(f"r{number}", [Message("user", "q")], "a") for number in range(900)]
    found = shard_of(held_out[:300], 0.15)
    assert [score.text for score in found.scores["candidate"]] == [record.id for record in found.order(held_out)]
    assert len(found.tokens) == 299

    def drawn(most: int, left: list[Record] = held_out[300:]) -> int:
        more = further(changed(config, f"evaluate.max_records={most}"), held_out[:300], left, found)
        assert list(more) == left[: len(more)]
        return len(more)

    needed = (Z * 0.15 / 0.02) ** 2
    assert drawn(1000) == pytest.approx(needed - 299, abs=0.15 * needed)
    assert drawn(320) == 21
    assert drawn(1000, held_out[300:310]) == 10
    assert drawn(0) == drawn(300) == drawn(1000, held_out[300:301]) == 0


def test_what_was_drawn_later_stands_behind_what_was_first() -> None:
    first, later = ([Record(f"{name}{i}", [Message("user", "q")], "a") for i in range(6)] for name in "rs")
    both = merged([shard_of(first, 0.1), shard_of(later, 0.1)])
    assert [*both.tokens] == ["r0", "r2", "r4", "r1", "r3", "s0", "s2", "s4", "s1", "s3", "s5"]
    assert [score.text for score in both.scores["champion"]] == [*both.tokens]


ALL_THAT_A_TRAINING_TURNS_ON = ["method.dropout=0.1", "train.gradient_checkpointing=true"]


def measured(config: RunConfig, version_id: str, **how: Any) -> Any:
    """What a task measures."""
    from components.registry.versions import resolve
    from components.store.store import Store
    from ray_jobs.evaluate import _contenders
    from ray_jobs.scoring.measure import measure_shard

    store = Store.open(config.registry)
    contenders = _contenders(config, store, resolve(store, f"{config.adapter.name}@{version_id}"))
    kernels = Kernels(config.ray.cpu_matmul_dtype)
    return measure_shard(contenders, RECORDS[:11], shard_index=1, kernels=kernels, **how)


def measured_where_it_was_trained(config: RunConfig, dense_base: bool) -> tuple[str, Any, int]:
    """Train, publish and measure in one process: the version, what was found, and how often a base was read."""
    import weakref
    from datetime import UTC, datetime
    from unittest import mock

    from ray_jobs.training import zero

    cache, optimizers = BaseCache(), []

    def made(*arguments: Any) -> Any:
        optimizers.append(weakref.ref(found := make(*arguments)))
        return found

    make = zero.make
    with mock.patch.object(zero, "make", made):
        fitted = fit_in_rank(config, colour_rows(80), run_id="run", dense_base=dense_base, load=cache.load)
    how = (fitted.spec, fitted.store, fitted.fitted, fitted.worker)
    version = publishing.publish(*how, started_at=datetime.now(UTC)).version
    del fitted, how
    cache.strip()
    assert [each() for each in optimizers] == [None]  # and so the memory of what it holds is free
    return version, measured(config, version, cache=cache), cache.num_loaded


@pytest.mark.parametrize(
    ("method", "dtype", "dense_base", "loaded"),
    [
        pytest.param("qlora", "bfloat16", False, 1, marks=pytest.mark.slow),
        ("loftq", "float32", True, 3),  # its own base, the one that it is compared with, and its own again
        pytest.param("dvora", "bfloat16", False, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("more", [[], pytest.param(ALL_THAT_A_TRAINING_TURNS_ON, marks=pytest.mark.slow)])
def test_a_model_scores_where_it_was_trained_as_in_a_process_of_its_own(
    placed, tmp_path: Path, method, dtype, dense_base, loaded, more
):
    """To the bit: memory has room, so that a task holds the base dense as well."""
    settings = ["ray.num_workers=1", "train.max_steps=3", "evaluate.batch_size=5"]
    config = placed(*settings, f"method.name={method}", f"ray.cpu_matmul_dtype={dtype}", *more)
    ((version, here, num_loaded),) = in_group(
        measured_where_it_was_trained, config, dense_base, directory=tmp_path / "here", num_workers=1
    )
    (there,) = in_group(measured, config, version, directory=tmp_path / "there", num_workers=1)
    assert here == there
    assert list(here.scores) == list(there.scores) == ["base", "candidate"]
    assert here.scores["candidate"] != here.scores["base"]
    assert num_loaded == loaded


@pytest.fixture
def loading(config):
    """How a base is asked for."""
    return base_model.resolve(config.model), config.model, "bf16", PLAIN


def test_what_deepspeed_brings_into_16_bits_is_as_wide_again_as_it_was_read(config, loading, monkeypatch):
    """As transformers leaves some models' routers in float32."""
    read = base_model.load_model
    wide = 1.0 + torch.arange(32) / 1009

    def load(*asked: Any, **how: Any) -> Any:
        model = read(*asked, **how)
        model.model.norm.weight.data = wide[: len(model.model.norm.weight)].clone()
        return model

    monkeypatch.setattr(base_model, "load_model", load)
    cache = BaseCache()
    fresh = {name: weight.clone() for name, weight in cache.load(*loading, use_gpu=False).named_parameters()}
    adapted = build.attach(cache.load(*loading, use_gpu=False), config.method, base_reference="", seed=0)
    for parameter in adapted.parameters():  # deepspeed/runtime/engine.py, _cast_module_mixed_precision
        parameter.data = parameter.data.to(torch.bfloat16)
    again = dict(cache.load(*loading, use_gpu=False).named_parameters())
    assert again.keys() == fresh.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in fresh.items())
    assert again["model.norm.weight"].dtype is torch.float32
    assert cache.num_loaded == 1


def test_weights_that_were_moved_beside_others_are_their_layers_own_again(config, loading):
    cache = BaseCache()
    model = cache.load(*loading, use_gpu=False)
    fresh = {name: weight.clone() for name, weight in model.named_parameters()}
    adapted = PLAIN.adopt(build.attach(model, config.method, base_reference="", seed=0))
    build.to_training(adapted, torch.bfloat16)
    adapted.train()(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
    moved = [name for name, weight in model.named_parameters() if not weight.is_contiguous()]
    assert len(moved) >= 7
    again = dict(cache.load(*loading, use_gpu=False).named_parameters())
    assert all(again[name].is_contiguous() and torch.equal(weight, again[name]) for name, weight in fresh.items())
    assert sum(weight.untyped_storage().nbytes() for weight in again.values()) == sum(w.nbytes for w in fresh.values())


def test_nothing_of_a_training_stays_on(config, loading):
    cache = BaseCache()
    opening.assemble(changed(config, *ALL_THAT_A_TRAINING_TURNS_ON), loading[0], use_gpu=False, load=cache.load)
    model = cache.load(*loading, use_gpu=False, dtype=torch.bfloat16)
    assert cache.num_loaded == 1
    hooks = {"_forward_hooks", "_backward_hooks", "_forward_pre_hooks"}
    watched = [name for name, module in model.named_modules() if any(getattr(module, each) for each in hooks)]
    assert watched == ["lm_head"]  # whose input is made contiguous: base_model.load_model
    assert not model.is_activation_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config")
