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
    moving: float = 0.0
    """By how much a night of new data makes the models of earlier nights wrong, in nats per token."""
    kept: float = 0.0
    """Share of production's weights in what a night publishes; of losses it is taken for the same share."""

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


def between(new: dict[str, Array], production: dict[str, Array], kept: float, random: np.random.Generator) -> None:
    """Move what a night has trained towards production, which each record's answer is with that chance."""
    from_production = random.random(len(TOKENS)) < kept
    for column, values in new.items():
        theirs = production[column]
        mixed = np.where(from_production, theirs, values) if column == "exact_match" else None
        new[column] = kept * theirs + (1 - kept) * values if mixed is None else mixed


@dataclass(frozen=True)
class Year:
    """What came of a hundred nights; the gate has no part in these numbers."""

    held: Sequence[float]
    """The true loss of what the alias points to after each night."""
    promoted: int
    behind: float
    """How far that lay above what this recipe gives on the whole, at most."""
    worse: int
    """Candidates that were truly worse than production by the margin or more."""
    promoted_worse: int
    """How many of them were promoted."""


def year(trainer: Trainer, policy: GateConfig, *, records: int = RECORDS, seed: int = 0, shrinks: bool = True) -> Year:
    """A hundred nights; without `shrinks` a champion is as measured, whatever chose it."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, len(TOKENS), records)
    columns, held, behind = dict(MEASURED.columns), [], []
    champion = best = ""
    decisions: list[Decision] = []
    promoted = worse = promoted_worse = 0
    for night in range(NIGHTS):
        candidate = f"night{night}"
        for older in {champion, best} - {""} if trainer.moving else ():
            columns[f"{older}_nll"] = columns[f"{older}_nll"] + TOKENS * trainer.moving
        trained = trainer.train(night, random)
        if champion and trainer.kept:
            between(trained, {key: columns[f"{champion}_{key}"] for key in trained}, trainer.kept, random)
        columns |= {f"{candidate}_{key}": values for key, values in trained.items()}
        roles = {"base": "base", "candidate": candidate}
        if champion:
            roles |= {"champion": champion} if best == champion else {"champion": champion, "anchor": best}
        measured, evidence = Task(TOKENS, MEASURED.references, columns).of(rows, roles)
        lead = lead_of(f"candidate-{champion}", policy.metric, decisions) if shrinks else None
        decision = decide(measured, policy, evidence, look=night + 1, passed_before=max(promoted - 1, 0), lead=lead)
        decisions.append(decision)
        if champion and loss(columns[f"{candidate}_nll"] - columns[f"{champion}_nll"]) >= policy.worse_than_champion_by:
            worse += 1
            promoted_worse += decision.promoted
        if decision.promoted:
            promoted += 1
            champion = candidate
            best = candidate if decision.anchor == decision.version else best
        held.append(loss(columns[f"{champion}_nll"]))
        behind.append(held[-1] - loss(FIRST) - trainer.decay * night)
    return Year(held, promoted, max(behind), worse, promoted_worse)
