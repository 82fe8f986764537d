"""Ray Tune with trials that only pretend to train: who is tried, who is stopped, and what is kept of one that fails."""

import os
from types import SimpleNamespace

import pytest

from components.config import config_file
from components.shared.errors import DataError
from ray_jobs.sweeping import verdict
from ray_jobs.sweeping.plan import Plan, swept_methods
from tests.models.spec import changed
from tests.ray_jobs import own_ray

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
