"""What a hundred nights of deciding do to production."""

import numpy as np
import pytest
from scipy.stats import binomtest

from components.config.gate import GateConfig
from tests.components.gate.nights import NIGHTS, Trainer, in_production, lost_of_the_best, year

SEEDS_OF_CHANCE = range(5)
POLICY = GateConfig()


@pytest.mark.parametrize(
    ("trainer", "promoted"),
    [
        pytest.param(Trainer(apart=0.1, on_the_whole=0.002), 90, id="steady"),
        pytest.param(
            Trainer(apart=0.1, on_the_whole=0.002, decay=0.005), 5, id="steady, data decay", marks=pytest.mark.slow
        ),
        pytest.param(Trainer(apart=1.0, on_the_whole=0.02), 3, id="noisy"),
        pytest.param(Trainer(apart=1.0, on_the_whole=0.02, decay=0.001), 2, id="noisy, data decay"),
    ],
)
def test_production_stays_inside_the_total_budget(trainer: Trainer, promoted: int) -> None:
    """It is never truly worse than what it once was by more, though the gate lets some, or most, candidates pass: by
    0.004, 0.040, 0.004 and 0.005 nats per token."""
    held = in_production(trainer, POLICY)
    assert lost_of_the_best(held) <= POLICY.total_budget
    assert len(set(held)) >= promoted


def test_without_the_budget_small_steps_down_add_up() -> None:
    """What the budget is for: each night is within the margin of the one before, and all of them are half a nat."""
    decaying = Trainer(apart=0.1, on_the_whole=0.002, decay=0.005)
    held = in_production(decaying, GateConfig(worse_than_best_by=99.0))
    assert lost_of_the_best(held) == pytest.approx(NIGHTS * decaying.decay, abs=0.02)


@pytest.mark.full
@pytest.mark.parametrize("moving", [0.0, 0.002])
def test_a_quiet_recipe_refreshes_production_on_a_thousand_records(moving: float) -> None:
    """Over five seeds of chance, at 0.7 of the distance that the example's two seeds have."""
    trainer = Trainer(apart=0.7, on_the_whole=0.007, moving=moving)
    years = [year(trainer, POLICY, records=1000, seed=seed) for seed in SEEDS_OF_CHANCE]
    promoted = [each.promoted for each in years]
    assert np.median(promoted) >= 50
    assert min(promoted) >= 20
    assert all(lost_of_the_best(each.held) <= POLICY.total_budget for each in years if not moving)
    assert all(each.behind <= 0.05 for each in years if moving)
    worse, promoted_worse = sum(each.worse for each in years), sum(each.promoted_worse for each in years)
    assert binomtest(promoted_worse, worse, 0.05, alternative="greater").pvalue > 0.01, (promoted_worse, worse)
