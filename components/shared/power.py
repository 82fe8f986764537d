"""What a number of held-out records lets the gate tell, by its own bounds on an assumed difference; pure."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from components.shared import binomial
from components.shared.metrics import Metric
from components.shared.paired import POWER, Pairs, bounds, score_bounds

RIGHT_OR_WRONG = ("exact_match", "json_valid", "label_accuracy")
"""Metrics whose every record is right or wrong."""
MOST = 10_000_000
"""No number of records above this is worth naming."""
DRAWN = 400
"""Records on which the bootstrap's distance is measured; for another number it goes with the root."""


@dataclass(frozen=True)
class Assumed:
    """How the gate compares, and by how much two trainings of one recipe are taken to differ."""

    metric: Metric
    margin: float
    """How much worse a candidate may be, in the metric's unit: gate.worse_than_champion_by."""
    confidence: float
    rare_share: float
    """The share of records whose large losses have to show; 1 asks for none (gate.much_worse_share)."""
    spread: float
    """Of metrics from 0 to 1 the share of answers that change; else the standard deviation of a record's difference."""
    equal_weight: float = 1.0
    """What a record tells of what one of equal weights would (Kish): the longest answers of a loss weigh most."""
    in_groups: bool = False

    @property
    def is_binary(self) -> bool:
        return self.metric.key in RIGHT_OR_WRONG and not self.in_groups

    @property
    def deviation(self) -> float:
        """Standard deviation of a record's difference; a changed mark is taken to be wholly gained or lost."""
        return math.sqrt(self.spread) if self.metric.is_share else self.spread

    @property
    def fewest(self) -> int:
        """Records without which no candidate replaces a version, however good it is."""
        if self.is_binary or self.rare_share >= 1:
            return 1
        return math.ceil(binomial.least_of(0, self.rare_share, self.confidence) / self.equal_weight)

    def better_by(self, records: int) -> float:
        """The least gain measured on so many records that passes, in the metric's unit; below 0 it may be worse."""
        if not self.is_binary:
            normal = NormalDist(0, self.deviation)
            drawn = np.array([normal.inv_cdf((place + 0.5) / DRAWN) for place in range(DRAWN)])
            of_drawn = bounds(Pairs(drawn, np.zeros(DRAWN), np.ones(DRAWN)), self.confidence)
            assert of_drawn is not None  # every number is finite
            return (of_drawn.gain - of_drawn.lower) * math.sqrt(DRAWN / (records * self.equal_weight)) - self.margin
        changed = self.spread * records
        low, high = -changed, changed
        for _ in range(40):
            middle = (low + high) / 2
            bound, _ = score_bounds((changed + middle) / 2, (changed - middle) / 2, records, self.confidence)
            low, high = (low, middle) if bound >= -self.margin else (middle, high)
        return high / records

    def equal_passes(self, records: int) -> float:
        """The probability that a candidate as good as production passes."""
        if records < self.fewest:
            return 0.0
        error = self.deviation / math.sqrt(records * self.equal_weight)
        return 1 - NormalDist(0, error).cdf(self.better_by(records))

    def equal_with(self) -> int | None:
        """The fewest records with which that is four nights in five; None if no number does."""
        low, high = 1, 2
        while self.equal_passes(high) < POWER:
            low, high = high, 2 * high
            if high > MOST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.equal_passes(middle) >= POWER else (middle, high)
        return high


def power_of(assumed: Assumed, records: int, *, amounts: Metric, kind: str = "records") -> dict[str, Any]:
    """What so many records tell, as JSON: by how much a candidate has to come out `better_by` to replace production
    (None: none can, at most 0: an equal one does); how often an equal one does, and with how many records four nights
    in five; the fewest with which any can; and a sentence. `amounts` is the metric in whose unit the margin is."""
    better_by = assumed.better_by(records) if records >= assumed.fewest else None
    passes, needed = assumed.equal_passes(records), assumed.equal_with()
    enough = f"with {needed:,} {kind}" if needed else "with no number of them"
    differs = f"if losses differ by {assumed.spread:.2g} from record to record"
    if assumed.metric.is_share:
        differs = f"if {assumed.spread:.0%} of answers change"
    if better_by is None:
        how = (
            f"nothing can replace it, as only {assumed.fewest:,} would show rare large losses (an equal candidate "
            f"passes four nights in five {enough}): raise data.eval_share or gate.worse_than_champion_by, or add data"
        )
    elif better_by > 0:
        better = f"{amounts.amount_text(better_by)} {'' if amounts.is_share else amounts.unit}".strip()
        how = f"to replace it, a candidate has to come out {better} better, or be equal {enough} ({differs})"
    else:
        how = f"an equal candidate replaces it in some {100 * passes:.0f} nights of 100 ({differs})"
        how += f", and in 80 {enough}" if passes < POWER else ""
    return {
        "metric": assumed.metric.key,
        "records": records,
        "margin": assumed.margin,
        "better_by": better_by,
        "equal_passes": passes,
        "equal_with": needed,
        "fewest": assumed.fewest,
        "equal_weight": assumed.equal_weight,
        "sentence": f"{records:,} {kind} judge by {assumed.metric.label}: a first version can be promoted; {how}",
    }
