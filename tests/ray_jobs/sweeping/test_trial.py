"""Trials on a base that stays in memory: each must be the training that a process of its own would do; and Ray Tune
with trials that only pretend to train: who is tried, who is stopped, and what is kept of one that fails.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.config import config_file
from components.records.sweep import Trial
from components.shared.errors import DataError
from ray_jobs.sweeping import verdict
from ray_jobs.sweeping.plan import Plan, swept_methods
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group
from tests.ray_jobs import own_ray
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


LOSSES = {1e-4: 4.0, 3.16e-4: 3.0, 1e-3: 1.0, 3.16e-3: 2.0, 1e-2: 5.0}


def pretend(given: dict) -> None:
    """Report at a quarter, half and the end; one rate raises, and the process of another dies."""
    from ray import tune

    trial = given["trial"]
    rate = trial["learning_rate"]
    if rate == 1e-2:
        raise DataError("these records cannot be read")
    if rate == 3.16e-4:
        os._exit(1)
    for step in (4, 8, 16):
        ended = {"status": "finished"} if step == 16 else {}
        report = {**trial, "steps": step, "loss": given["losses"][rate], **ended}
        tune.report({"loss": report["loss"], "step": step, "trial": report})


def swept(config_toml, storage_path):
    """Sweep with room for one trial at a time, so that they come in order; the best rate, and the trials as kept."""
    from ray import tune

    from ray_jobs.sweeping.trial import Ledger, as_config, run

    config = config_file.loads(config_toml)
    plan = Plan(config, swept_methods(config))
    kept = []

    def with_losses(point):
        return {**as_config(config, point, 256), "losses": LOSSES}

    ledger = Ledger(plan, kept.append, print)
    pretended = tune.with_resources(pretend, {"CPU": 1})
    run(pretended, plan, with_losses, ledger, num_steps=16, storage_path=storage_path)
    return plan.tuned(*swept_methods(config)).learning_rate, {trial.learning_rate: trial for trial in kept}


@pytest.mark.full
def test_trials_that_fail_are_kept_with_their_causes_and_the_others_go_on(config, tmp_path):
    five = changed(config, "train.learning_rate=1e-3", "tune.max_steps=16", f"tune.learning_rates={[*LOSSES]}")
    with own_ray.driver(1) as pool:
        best, kept = pool.submit(swept, config_file.dumps(five), str(tmp_path)).result()
    assert {rate: trial.status for rate, trial in kept.items()} == {
        **dict.fromkeys([1e-4, 1e-3, 3.16e-3], "finished"),
        **dict.fromkeys([3.16e-4, 1e-2], "failed"),
    }
    assert kept[3.16e-4].why == "The actor died unexpectedly before finishing this task."
    assert kept[1e-2].why == "these records cannot be read"
    assert best == 1e-3


def test_a_trial_stops_halfway_where_it_is_worse_than_the_median_of_its_method_s_before_it():
    from ray_jobs.sweeping.trial import StopsWorseHalf

    scheduler = StopsWorseHalf(16)

    def stops(name, loss, step=8, method="lora", compares=False):
        trial = SimpleNamespace(config={"trial": {"name": name, "method": method, "compares": compares}})
        return scheduler.on_trial_result(None, trial, {"step": step, "loss": loss}) == "STOP"

    # Nobody to compare the first with; the next two are the best so far; then one in the middle, and the worst.
    losses = [4.0, 3.0, 1.0, 2.0, 5.0]
    assert [stops(str(place), loss) for place, loss in enumerate(losses)] == [False, False, False, False, True]
    assert not stops("early", 9.0, step=4)
    assert not stops("0", 9.0, step=12)  # which has been judged
    assert not stops("other", 9.0, method="dora")
    assert not stops("compared", 9.0, compares=True)
    assert stops("early", 9.0, step=8)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Traceback:\n  File x\ncomponents.shared.errors.DataError: no answer\n", "no answer"),
        ("Traceback:\ntorch.OutOfMemoryError: CUDA out of memory.\n", "OutOfMemoryError: CUDA out of memory."),
        ("The actor died unexpectedly.\n\tclass_name: ImplicitFunc\n", "The actor died unexpectedly."),
    ],
)
def test_of_what_ray_tells_of_a_failure_the_line_that_says_why_is_kept(text, why):
    assert verdict.cause(f"Failure # 1\n{text}") == why
