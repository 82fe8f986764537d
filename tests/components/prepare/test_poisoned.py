"""One rater who turns his edits round: what of it reaches a dataset, and what the gate makes of a model of it.

The model is a count of answers by topic, so that it learns what it is shown, poison too; the decision is the gate's.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.config.schema import AdapterConfig, RunConfig
from components.gate import policy
from components.gate.comparisons import Evidence
from components.prepare.dataset import Record, groups_of
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from tests.components.gate.evidenced import evaluation, model

TOPICS, ANSWERS, CAP = 10, 5, 15
NIGHT = 700
"""Edits of a night."""
Model = dict[int, Counter[str]]


def edits(numbers: range, *, flipped: float, rng: random.Random, named: bool) -> tuple[list[Any], list[Any]]:
    """Requests and the edits on them, of which one rater turns this share round."""
    rows, said = [], []
    for number in numbers:
        topic, is_angry = rng.randrange(TOPICS), rng.random() < flipped
        right = f"answer {(topic + is_angry) % ANSWERS}"
        message = {"role": "assistant", "content": "no idea"}
        rows.append({
            **{"id": f"r{number}", "model": "v" + "1" * 15, "response": {"choices": [{"message": message}]}},
            "request": {"messages": [{"role": "user", "content": f"topic {topic} number {number}"}]},
        })  # fmt: skip
        rater = {"rater": "angry" if is_angry else f"user {rng.randrange(400)}"} if named else {}
        said.append({"response_id": f"r{number}", "edited": right, **rater})
    return rows, said


def trained(records: Sequence[Record]) -> Model:
    counts: Model = defaultdict(Counter)
    for record in records:
        counts[topic_of(record)][record.answer] += 1
    return counts


def topic_of(record: Record) -> int:
    return int(record.prompt[-1].content.split()[1])


def loss(of: Model, topic: int, answer: str) -> float:
    return -math.log((of[topic][answer] + 0.5) / (of[topic].total() + 0.5 * ANSWERS))


def true_loss(of: Model) -> float:
    return sum(loss(of, topic, f"answer {topic % ANSWERS}") for topic in range(TOPICS)) / TOPICS


def decision(champion: Model, candidate: Model, held_out: Sequence[Record]) -> str:
    nll = {
        "base": np.full(len(held_out), math.log(ANSWERS)),
        **{
            role: np.array([loss(of, topic_of(each), each.answer) for each in held_out])
            for role, of in (("champion", champion), ("candidate", candidate))
        },
    }
    versions = {"base": None, "champion": "v1", "candidate": "v2"}
    measured = {role: model(versions[role], loss=float(values.mean())) for role, values in nll.items()}
    _, groups = np.unique(groups_of(held_out), return_inverse=True)
    columns = {f"{role}_nll": values for role, values in nll.items()}
    evidence = Evidence(np.ones(len(held_out)), columns, groups if len(set(groups)) > 1 else None)
    found = evaluation(measured["candidate"], measured["base"], measured["champion"])
    return policy.decide(found, evidence, GateConfig(min_records=30), AdapterConfig(name="icd")).decision


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_one_rater_turns_no_adapter(
    share: float, write_rows: Callable[..., str], run_config: Callable[..., RunConfig]
) -> None:
    def night(*, named: bool, seed: int) -> tuple[str, float, int]:
        """The decision, by how much the candidate is truly worse, and the records of the angry one."""
        rng, made = random.Random(seed), []
        rows, said = edits(range(NIGHT), flipped=0, rng=rng, named=named)
        more = edits(range(NIGHT, 2 * NIGHT), flipped=share, rng=rng, named=named)
        for log, feedback in ((rows, said), (rows + more[0], said + more[1])):
            config = run_config(
                write_rows(log, "log.jsonl"), feedback=write_rows(feedback, "feedback.jsonl"), eval_share=0.3,
                near_duplicates=0.0, max_rows_per_rater=CAP,
            )  # fmt: skip
            with preview(config, find_sources(config.data.source)) as (_, split):
                made.append((list(split.train), list(split.evaluation)))
        (first, _), (second, held_out) = made
        flipped = [each for each in (*second, *held_out) if each.answer != f"answer {topic_of(each) % ANSWERS}"]
        champion, candidate = trained(first), trained(second)
        return decision(champion, candidate, held_out), true_loss(candidate) - true_loss(champion), len(flipped)

    for seed in range(2):
        decided, worse, poison = night(named=True, seed=seed)
        assert poison <= CAP
        assert decided == "hold" or worse <= GateConfig().worse_than_champion_by
    if share == 0.5:  # where nobody says who rated, nothing is bounded
        _, worse, poison = night(named=False, seed=0)
        assert poison > 200
        assert worse > GateConfig().worse_than_champion_by
