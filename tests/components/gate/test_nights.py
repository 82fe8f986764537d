"""What a hundred nights of deciding do to production."""

import pytest

from components.config.gate import GateConfig
from components.shared import paired
from tests.components.gate.nights import NIGHTS, Trainer, lost_of_the_best, year


@pytest.fixture(autouse=True)
def _a_quarter_of_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    monkeypatch.setattr(paired, "PER_TAIL", 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "promoted"),
    [
        pytest.param(Trainer(apart=0.1, on_the_whole=0.002), 90, id="steady"),
        pytest.param(Trainer(apart=1.0, on_the_whole=0.02), 3, id="noisy"),
    ],
)
def test_production_stays_inside_the_total_budget(trainer: Trainer, promoted: int) -> None:
    """It is never truly worse than what it once was by more, though the gate lets some, or most, candidates pass."""
    held = year(trainer, GateConfig()).held
    assert lost_of_the_best(held) <= GateConfig().total_budget
    assert len(set(held)) >= promoted


@pytest.mark.slow
def test_without_the_budget_small_steps_down_add_up() -> None:
    """What the budget is for: each night is within the margin of the one before, and all of them are half a nat; with
    it, a few of them are let in."""
    decaying = Trainer(apart=0.1, on_the_whole=0.002, decay=0.005)
    held = year(decaying, GateConfig(worse_than_best_by=99.0)).held
    assert lost_of_the_best(held) == pytest.approx(NIGHTS * decaying.decay, abs=0.02)
    budgeted = year(decaying, GateConfig()).held
    assert lost_of_the_best(budgeted) <= GateConfig().total_budget
    assert len(set(budgeted)) > 2  # and it leaves room for some steps down
