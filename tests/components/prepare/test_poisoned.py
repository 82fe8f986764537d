"""One rater who turns his edits round: what of it reaches a dataset, and what the gate makes of a model of it.

The model is a count of answers by topic, so that it learns what it is shown, poison too; the decision is the gate's.
What is held out is an audit of as many answers, whose labels are right: what people edited is trained on alone.
"""

import hashlib
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
from components.prepare.audit import name_of_draw
from components.prepare.dataset import Record, groups_of
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from components.prepare.workspace import position
from tests.components.gate.evidenced import evaluation, model

TOPICS, ANSWERS, CAP = 10, 5, 15
NIGHT, USERS = 1000, 3000
"""Edits of a night, and who makes them."""
EVAL_SHARE = 0.3
MARGIN = GateConfig().worse_than_champion_by
Model = dict[int, Counter[str]]


def edits(numbers: range, *, flipped: float, rng: random.Random) -> tuple[list[Any], list[Any]]:
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
        rater = "angry" if is_angry else f"user {rng.randrange(USERS)}"
        said.append({"response_id": f"r{number}", "edited": right, "rater": rater})
    return rows, said


def audit(rows: Sequence[Any]) -> list[Any]:
    """The right label of every answer that is held out."""
    topics = {row["id"]: int(row["request"]["messages"][0]["content"].split()[1]) for row in rows}
    drawn = [name for name in topics if position(hashlib.sha256(f"id:{name}".encode()).digest()) < EVAL_SHARE]
    about = {"audit": name_of_draw(drawn), "rater": "auditor"}
    return [{"response_id": name, "label": f"answer {topics[name] % ANSWERS}", **about} for name in drawn]


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
    topics, models = [topic_of(each) for each in held_out], {"champion": champion, "candidate": candidate}
    columns = {"base_nll": np.full(len(held_out), math.log(ANSWERS)), "base_exact_match": np.zeros(len(held_out))}
    for role, of in models.items():
        says = {topic: of[topic].most_common(1)[0][0] for topic in of}
        pairs = [*zip(topics, [each.answer for each in held_out], strict=True)]
        columns[f"{role}_nll"] = np.array([loss(of, topic, answer) for topic, answer in pairs])
        columns[f"{role}_exact_match"] = np.array([float(says[topic] == answer) for topic, answer in pairs])
    others = [*topics[1:], topics[0]]
    pairs = zip(others, held_out, strict=True)
    columns["candidate_other_prompt_nll"] = np.array([loss(candidate, topic, each.answer) for topic, each in pairs])
    versions = {"base": None, "champion": "v1", "candidate": "v2"}
    measured = {}
    for role, version in versions.items():
        means = {"loss": columns[f"{role}_nll"].mean(), "exact_match": columns[f"{role}_exact_match"].mean()}
        measured[role] = model(version, **{metric: float(mean) for metric, mean in means.items()})
    _, groups = np.unique(groups_of(held_out), return_inverse=True)
    evidence = Evidence(np.ones(len(held_out)), columns, groups if any(each.group for each in held_out) else None)
    found = evaluation(measured["candidate"], measured["base"], measured["champion"])
    return policy.decide(found, evidence, GateConfig(), AdapterConfig(name="icd")).decision


Night = Callable[..., tuple[str, float, int]]


@pytest.fixture
def night(write_rows: Callable[..., str], run_config: Callable[..., RunConfig]) -> Night:
    def of(share: float, seed: int, *, cap: int = CAP) -> tuple[str, float, int]:
        """The decision, by how much the candidate is truly worse, and the records of the angry one."""
        rng, made = random.Random(seed), []
        rows, said = edits(range(NIGHT), flipped=0, rng=rng)
        more = edits(range(NIGHT, 2 * NIGHT), flipped=share, rng=rng)
        for log, feedback in ((rows, said), (rows + more[0], said + more[1])):
            config = run_config(
                write_rows(log, "log.jsonl"), feedback=write_rows([*feedback, *audit(log)], "feedback.jsonl"),
                eval_share=EVAL_SHARE, near_duplicates=0.0, max_rows_per_rater=cap,
            )  # fmt: skip
            with preview(config, find_sources(config.data.source)) as (_, split):
                made.append((list(split.train), list(split.evaluation)))
        (first, _), (second, held_out) = made
        flipped = [each for each in (*second, *held_out) if each.answer != f"answer {topic_of(each) % ANSWERS}"]
        champion, candidate = trained(first), trained(second)
        return decision(champion, candidate, held_out), true_loss(candidate) - true_loss(champion), len(flipped)

    return of


def test_a_night_without_poison_is_promoted(night: Night) -> None:
    decided, worse, poison = night(0, seed=0)
    assert (decided, poison) == ("promote", 0)
    assert worse < 0


@pytest.mark.slow
@pytest.mark.parametrize(("share", "cap", "seed"), [(0.5, CAP, 0), (0.2, 0, 0), (0.5, 0, 1)])
def test_one_rater_turns_no_adapter(share: float, cap: int, seed: int, night: Night) -> None:
    decided, worse, poison = night(share, seed, cap=cap)
    assert poison <= CAP if cap else poison > CAP
    assert decided == "hold" or worse <= MARGIN  # without a bound too: he has no say in what judges
