"""One policy for answers of three tokens and of two hundred, on losses that were measured on the real model.

`python -m benchmarks.gate` has trained it on the example and on docstrings, and kept what every held-out record
costs the base and the trained model. What is judged here is the trained one, as it is or made worse.
"""

from dataclasses import replace

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.records.steps import Decision
from components.shared import paired
from tests.components.gate.evidenced import decide, rule
from tests.components.gate.measured_losses import read
from tests.components.gate.nights import NIGHTS, Trainer, lost_of_the_best, year

TASKS = ("icd10", "docstrings")
POLICY = GateConfig(margins="relative", worse_than_champion_by=0.05)
STEADY, NOISY = Trainer(apart=0.1, on_the_whole=0.002), Trainer(apart=1.0, on_the_whole=0.02)


def decided(task: str, *, worse_by: float | None = None, prompts_matter: bool = True) -> Decision:
    """On the trained model; with `worse_by`, against itself, on records that each cost so much more, give or take."""
    found = read(task)
    rows = np.arange(len(found.tokens))
    nll, other = (found.columns[f"seed0_{kept}"][rows] for kept in ("nll", "other_prompt_nll"))
    random = np.random.default_rng(0)
    changed = {}
    roles = {"base": "base", "candidate": "seed0"}
    if worse_by is not None:
        roles["champion"] = "seed0"
        spread = 0.02 * random.standard_normal(len(rows))
        changed["candidate_nll"] = nll * (1 + worse_by + spread - (spread * nll).sum() / nll.sum())
        changed["candidate_other_prompt_nll"] = other * (1 + worse_by)
    if not prompts_matter:
        changed["candidate_other_prompt_nll"] = nll * (1 + 0.001 * random.standard_normal(len(rows)))
    measured, evidence = found.of(rows, roles, changed)
    return decide(measured, POLICY, evidence)


@pytest.mark.parametrize("task", TASKS)
def test_the_trained_model_is_promoted(task: str) -> None:
    assert decided(task).verdict == "promote"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("worse_by", "verdict"), [(0.02, "promote"), (0.1, "hold")])
def test_as_much_worse_passes_or_fails_whatever_the_length(task: str, worse_by: float, verdict: str) -> None:
    decision = decided(task, worse_by=worse_by)
    assert decision.verdict == verdict
    asked = rule(decision, "not_worse_than_champion")
    assert asked.gain == pytest.approx(-worse_by, abs=1e-6)
    assert asked.passed is (verdict == "promote")


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_do_not_depend_on_their_prompts_are_held_whatever_the_length(task: str) -> None:
    decision = decided(task, prompts_matter=False)
    assert decision.verdict == "hold"
    assert all(reason.startswith("Answers do not depend on their prompts") for reason in decision.reasons)
    assert rule(decided(task), "limit_min").lower > 1.0


# What a hundred nights of deciding do to production.


@pytest.fixture(autouse=True)
def _a_quarter_of_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    monkeypatch.setattr(paired, "PER_TAIL", 10)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "promoted"), [(STEADY, 90), (NOISY, 3)], ids=["steady", "noisy"])
def test_production_stays_inside_the_total_budget(trainer: Trainer, promoted: int) -> None:
    """It is never truly worse than what it once was by more, though the gate lets some, or most, candidates pass."""
    held = year(trainer, GateConfig())
    assert lost_of_the_best(held) <= GateConfig().total_budget
    assert len(set(held)) >= promoted


@pytest.mark.slow
def test_without_the_budget_small_steps_down_add_up() -> None:
    """What the budget is for: each night is within the margin of the one before, and all of them are half a nat; with
    it, a few of them are let in."""
    decaying = replace(STEADY, decay=0.005)
    held = year(decaying, GateConfig(worse_than_best_by=99.0))
    assert lost_of_the_best(held) == pytest.approx(NIGHTS * decaying.decay, abs=0.02)
    budgeted = year(decaying, GateConfig())
    assert lost_of_the_best(budgeted) <= GateConfig().total_budget
    assert len(set(budgeted)) > 2  # and it leaves room for some steps down
