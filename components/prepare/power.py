"""What held-out records let the gate tell of two trainings of one recipe, by the gate's own bounds; pure."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from components.config.gate import GateConfig
from components.config.schema import RunConfig
from components.prepare.split import Judges
from components.shared.metrics import RELATIVE, Metric, metric_of
from components.shared.paired import POWER, Pairs, bounds, score_bounds

CHARS_OF_A_TOKEN = 4
CHANGED, SPREAD = 0.12, 0.22
"""Between two trainings of one recipe from the base: the share of answers that change, and the standard deviation of a
record's loss in nats per token, as two seeds of the example differ (`python -m benchmarks.gate`)."""
RIGHT_OR_WRONG = ("exact_match", "json_valid", "label_accuracy")
"""Metrics whose every record is right or wrong."""
MOST = 10_000_000
"""No number of records from here on is worth naming."""
DRAWN = 400
"""Records on which the bootstrap's distance is measured; for another number it goes with the root."""
STEPS = 5000
"""Into which the gains between no answer won and each of those that change are divided."""


def power(judging: Judges, config: RunConfig) -> dict[str, Any]:
    """What the gate can tell by these records, judged by their answers' lengths alone: no model is needed."""
    tokens: dict[str, float] = defaultdict(float)
    used = judging.records[: max(config.evaluate.records, config.evaluate.max_records)]
    for record in used:
        tokens[record.group or record.id] += len(record.answer) / CHARS_OF_A_TOKEN + 1  # the one that ends it
    total = sum(tokens.values())
    equal_weight = total**2 / (len(tokens) * sum(num_tokens**2 for num_tokens in tokens.values()))
    spread, in_groups = spread_of(config, total / len(tokens)), any(record.group for record in used)
    return power_of(config.gate, len(tokens), spread, equal_weight=equal_weight, in_groups=in_groups)


def spread_of(config: RunConfig, tokens: float) -> float:
    """By how much two trainings are taken to differ on an answer of so many tokens: of a metric from 0 to 1 the share
    of answers that change, else the standard deviation of a record's difference."""
    metric = metric_of(config.gate.metric)
    spread = CHANGED if metric.is_share else SPREAD * (tokens if metric.key == "answer_loss" else 1.0)
    return spread * (1 - config.train.start_share)  # what a version keeps of production does not differ


def power_of(
    gate: GateConfig, records: int, spread: float, *, equal_weight: float = 1.0, in_groups: bool = False
) -> dict[str, Any]:
    """What so many records, or groups, tell, as JSON: by how much a candidate has to come out `better_by` to replace
    production (None: none can, at most 0: an equal one does); how often an equal one does, and with how many records
    four nights in five; the fewest with which any can; and a sentence.

    `equal_weight` is what a record tells of what one of equal weights would (Kish): the longest answers of a loss weigh
    most. Production's loss, which is not known yet, is taken for 1.
    """
    metric = metric_of(gate.metric)
    is_binary = metric.key in RIGHT_OR_WRONG and not in_groups
    weight = equal_weight if metric.per_token else 1.0
    deviation = math.sqrt(spread) if metric.is_share else spread  # a changed mark is wholly gained or lost
    fewest = 1 if is_binary else math.ceil(gate.records_to_replace() / weight)
    drawn = np.array([NormalDist().inv_cdf((place + 0.5) / DRAWN) for place in range(DRAWN)])
    of_drawn = bounds(Pairs(drawn, np.zeros(DRAWN), np.ones(DRAWN)), gate.confidence)
    assert of_drawn is not None  # every number is finite

    def least_gain(records: int) -> float:
        if not is_binary:
            distance = -of_drawn.lower * math.sqrt(DRAWN / (records * weight))
            return distance * deviation - gate.worse_than_champion_by

        def bound(step: int) -> float:
            won, lost = (spread * records * (STEPS + sign * step) / (2 * STEPS) for sign in (1, -1))
            return score_bounds(won, lost, records, gate.confidence)[0]

        return spread * (bisect_left(range(-STEPS, STEPS), -gate.worse_than_champion_by, key=bound) - STEPS) / STEPS

    def passes(records: int) -> float:
        if records < fewest:
            return 0.0
        return NormalDist().cdf(-least_gain(records) * math.sqrt(records * weight) / deviation)

    equal_with = bisect_left(range(MOST), POWER, key=passes)
    tells = {
        "metric": metric.key,
        "records": records,
        "margin": gate.worse_than_champion_by,
        "better_by": least_gain(records) if records >= fewest else None,
        "equal_passes": passes(records),
        "equal_with": equal_with if equal_with < MOST else None,
        "fewest": fewest,
        "equal_weight": equal_weight,
    }
    kind = "groups of records" if in_groups else "records"
    differs = f"{spread:.0%} of answers change" if metric.is_share else f"losses differ by {spread:.2g} a record"
    how = _to_replace(tells, RELATIVE if gate.margins == "relative" else metric, kind, differs)
    tells["sentence"] = f"{records:,} {kind} judge by {metric.label}: a first version can be promoted; {how}"
    return tells


def _to_replace(tells: Mapping[str, Any], amounts: Metric, kind: str, differs: str) -> str:
    better_by, nights = tells["better_by"], 100 * tells["equal_passes"]
    enough = f"with {tells['equal_with']:,} {kind}" if tells["equal_with"] else "with no number of them"
    if better_by is None:
        return (
            f"nothing can replace it, as only {tells['fewest']:,} would show rare large losses (an equal candidate "
            f"passes four nights in five {enough}): raise data.eval_share or gate.worse_than_champion_by, or add data"
        )
    if better_by > 0:
        better = f"{amounts.amount_text(better_by)} {'' if amounts.is_share else amounts.unit}".strip()
        return f"to replace it, a candidate has to come out {better} better, or be equal {enough} (if {differs})"
    more = f", and in 80 {enough}" if nights < 80 else ""
    return f"an equal candidate replaces it in some {nights:.0f} nights of 100 (if {differs}){more}"
