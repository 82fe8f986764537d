"""A hundred nights of training and deciding, on losses that were measured on the real model.

Every night's model costs, on each of the 1,000 held-out records, what the example's first seed costs, give or take what
its second one differs there by (`python -m tests.benchmarks.gate`). Its true loss is that over all of these records, of
which the gate sees a sample, the same every night, as a test set is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.shared.paired import Array
from tests.components.gate.evidenced import decide
from tests.components.gate.measured_losses import Task, read

MEASURED = read("icd10")
TOKENS = MEASURED.tokens
SEEDS = ("seed0", "seed1")
FIRST, SECOND = (MEASURED.columns[f"{seed}_nll"] for seed in SEEDS)
NIGHTS, RECORDS = 100, 300
POLICY = GateConfig()


@dataclass(frozen=True)
class Trainer:
    """How a night's model comes out."""

    apart: float
    """How far two models lie apart from record to record; 1.0 is as far as the two seeds."""
    on_the_whole: float
    """Standard deviation of their true losses, in nats per token; the two seeds' differ by 0.010."""
    decay: float = 0.0
    """By how much each night's data makes it worse than the night before, in nats per token."""

    def train(self, night: int, random: np.random.Generator) -> dict[str, Array]:
        """What a model loses on each record, and which answers are right: as one seed's or the other's."""
        leans = random.standard_normal(len(TOKENS))
        of_records = self.apart * leans * (SECOND - FIRST) / math.sqrt(2)
        level = self.on_the_whole * random.standard_normal() + self.decay * night
        nll = FIRST + of_records + TOKENS * (level - loss(of_records))
        return {
            "nll": nll,
            "other_prompt_nll": nll + MEASURED.columns["seed0_other_prompt_nll"] - FIRST,
            "exact_match": np.where(leans < 0, *(MEASURED.columns[f"{seed}_exact_match"] for seed in SEEDS)),
        }


def loss(nll: Array) -> float:
    """Over all records, in nats per token."""
    return float(nll.sum() / TOKENS.sum())


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


def lost_of_the_best(held: Sequence[float]) -> float:
    """How far production was above the least loss that it had had before, at most."""
    return float(np.max(held - np.minimum.accumulate(held)))


def in_production(trainer: Trainer, policy: GateConfig) -> Sequence[float]:
    """The true loss of what the alias points to after each night; the gate has no part in these numbers."""
    random = np.random.default_rng(0)
    rows = random.integers(0, len(TOKENS), RECORDS)
    columns, losses = dict(MEASURED.columns), []
    champion = best = ""
    passed = 0
    for night in range(NIGHTS):
        candidate = f"night{night}"
        columns |= {f"{candidate}_{kept}": values for kept, values in trainer.train(night, random).items()}
        roles = {"base": "base", "candidate": candidate}
        if champion:
            roles |= {"champion": champion} if best == champion else {"champion": champion, "anchor": best}
        measured, evidence = Task(TOKENS, MEASURED.references, columns).of(rows, roles)
        decision = decide(measured, policy, evidence, look=night + 1, passed_before=passed)
        if decision.promoted:
            passed += bool(champion)
            champion = candidate
            best = candidate if decision.anchor == decision.version else best
        losses.append(loss(columns[f"{champion}_nll"]))
    return losses
