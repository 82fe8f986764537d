"""A hundred nights of training and deciding, on losses that were measured on the real model.

Every night's model costs, on each of the 1,000 held-out records, what the example's first seed costs, give or take what
its second one differs there by (`python -m benchmarks.gate`). Its true loss is that over all of these records, of
which the gate sees a sample, the same every night, as a test set is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.config.gate import GateConfig
from components.gate.comparisons import lead_of
from components.records.steps import Decision
from components.shared.paired import Array
from tests.components.gate.evidenced import decide
from tests.components.gate.measured_losses import Task, read

MEASURED = read("icd10")
TOKENS = MEASURED.tokens
SEEDS = ("seed0", "seed1")
FIRST, SECOND = (MEASURED.columns[f"{seed}_nll"] for seed in SEEDS)
NIGHTS, RECORDS = 100, 400


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


def lost_of_the_best(held: Sequence[float]) -> float:
    """How far production was above the least loss that it had had before, at most."""
    return float(np.max(held - np.minimum.accumulate(held)))


def year(trainer: Trainer, policy: GateConfig, *, records: int = RECORDS, seed: int = 0) -> list[float]:
    """The true loss, of which the gate sees nothing, of what the alias points to after each of a hundred nights."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, len(TOKENS), records)
    columns, held = dict(MEASURED.columns), []
    champion = best = ""
    decisions: list[Decision] = []
    promoted = 0
    for night in range(NIGHTS):
        candidate = f"night{night}"
        columns |= {f"{candidate}_{key}": values for key, values in trainer.train(night, random).items()}
        roles = {"base": "base", "candidate": candidate}
        if champion:
            roles |= {"champion": champion} if best == champion else {"champion": champion, "anchor": best}
        measured, evidence = Task(TOKENS, MEASURED.references, columns).of(rows, roles)
        lead = lead_of(f"candidate-{champion}", policy.metric, decisions)
        decision = decide(measured, policy, evidence, look=night + 1, passed_before=max(promoted - 1, 0), lead=lead)
        decisions.append(decision)
        if decision.promoted:
            promoted += 1
            champion = candidate
            best = candidate if decision.anchor == decision.version else best
        held.append(loss(columns[f"{champion}_nll"]))
    return held
