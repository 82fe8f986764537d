"""Trials on a base that stays in memory: each must be the training that a process of its own would do."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.config import config_file
from components.records.sweep import Trial
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group
from tests.ray_jobs.plain import passage_losses

ROWS = colour_rows(80)
METHODS = [
    *(pytest.param(name, marks=pytest.mark.full) for name in ("lora", "rslora", "dora", "qdora")),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("vera", "loftq", "dvora")),
    "qlora",
]


def trained_in_turn(configs: list[str], compares: bool = False) -> list[dict[str, Any]]:
    """What a worker does with one trial after the other, in its only process."""
    from components.registry import lineage
    from ray_jobs.base import base_model
    from ray_jobs.probes.texts import unread_passages
    from ray_jobs.scoring.measure import BaseCache
    from ray_jobs.sweeping.trial import Course, train_trial
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize
    from tests.doubles.datasets import validate
    from tests.models.spec import spec_of

    first = config_file.loads(configs[0])
    base = base_model.resolve(first.model)
    chat = chat_format.load(base, first.model)
    records = [validate(row).record for row in ROWS]
    train_split, validation = (tokenize(part, chat, 64) for part in (records[:64], records[64:]))
    cache, found = BaseCache(), []
    for number, toml in enumerate(configs):
        config = config_file.loads(toml)
        identity = lineage.Base(first.model.base, base.identity)
        spec = spec_of(config, run_id=f"trial{number}", base=identity, pad=chat.pad)
        trial = Trial(
            name=str(number), config_digest="", method=config.method.name, learning_rate=config.learning_rate,
            rank=config.method.r, batch_size=16, seed=0, status="running", compares=compares,
        )  # fmt: skip
        reports: list[Trial] = []
        passages = unread_passages(chat, config)
        trial = train_trial(spec, Course(trial), (train_split, validation), passages, cache, reports.append)
        found.append({**trial.model_dump(), "reports": [each.steps for each in reports]})
    return found


@pytest.fixture
def toml(placed):
    return lambda *changes: config_file.dumps(placed("ray.num_workers=1", *changes))


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_on_a_base_that_another_has_used_is_the_training_of_a_fresh_process(method, toml, tmp_path: Path):
    ours, other = toml(f"method.name={method}"), toml(f"method.name={method}", "train.learning_rate=3e-3")
    (fresh,) = in_group(trained_in_turn, [ours], directory=tmp_path / "fresh", num_workers=1)[0]
    _, again = in_group(trained_in_turn, [other, ours], directory=tmp_path / "again", num_workers=1)[0]
    assert fresh["status"] == again["status"] == "finished"
    np.testing.assert_array_equal(again["record_nll"], fresh["record_nll"])
    assert again["curve"] == fresh["curve"]
    assert (fresh["bases_loaded"], again["bases_loaded"]) == (1, 1)


def test_a_trial_that_compares_methods_reads_general_text_before_and_after(toml, tiny_base, tmp_path: Path):
    """The base's losses are those of transformers; those after a training at no rate to speak of are the base's."""
    settings = ["evaluate.general_passages=3", "train.max_steps=4"]
    configs = [toml(*settings, f"train.learning_rate={rate}") for rate in (1e-9, 1e-2)]
    still, moved = in_group(trained_in_turn, configs, True, directory=tmp_path, num_workers=1)[0]
    text = still["general_text"]
    max_length = config_file.loads(configs[0]).model.max_length
    assert text["nll"]["base"] == pytest.approx(passage_losses(tiny_base, max_length, 3), rel=0.01)
    assert text["nll"]["candidate"] == pytest.approx(text["nll"]["base"], rel=1e-3)
    assert moved["general_text"]["nll"]["base"] == text["nll"]["base"]
    assert moved["general_text"]["nll"]["candidate"] != pytest.approx(text["nll"]["base"], rel=1e-3)
    assert 0 < still["general_s"] < still["seconds"]


def test_a_trial_that_is_worse_than_its_start_ends_at_that_measurement(toml, tmp_path: Path):
    # Adam's first step is the rate for each weight, up or down: so large that no order of sums decides.
    settings = ["train.learning_rate=0.9", "method.alpha=512"]
    (found,) = in_group(trained_in_turn, [toml(*settings)], directory=tmp_path, num_workers=1)[0]
    assert (found["status"], found["loss"]) == ("diverged", None)
    assert found["steps"] < found["num_steps"]
    assert not found["curve"] or not found["curve"][-1][1] <= found["start_loss"]
    assert found["record_nll"] == []


@pytest.mark.parametrize("loss", [2.01, math.inf, math.nan])
def test_a_loss_above_the_bases_own_or_that_is_no_number_is_divergence(loss):
    from ray_jobs.sweeping.trial import Course, Diverged

    known = {"name": "t", "config_digest": "", "method": "lora", "learning_rate": 1.0, "rank": 1, "batch_size": 1}
    course = Course(Trial(**known, seed=0, status="running", start_loss=2.0))
    course.measured(1, 2.0)
    with pytest.raises(Diverged, match="after 2 steps"):
        course.measured(2, loss)
    assert [step for step, _ in course.trial.curve] == [1, 2]
