"""Bounds that may be looked at after every record, and acted on at any look; pure.

An ordinary bound that is read every night is wrong some night in far more than alpha of all years.
"""

import math

import numpy as np

from components.shared.paired import MANY_RECORDS, Array, Bounds, Pairs, gain_and_error

RHO2 = 1 / 80
"""The square of the paper's rho, which says where the bound is tightest, and has to be fixed before any record is seen.
At n records a / n is best, with a = -2 log(2 alpha) + log(1 - 2 log(2 alpha)) (section 2.3, with 2 alpha for one side):
this one at some 500 records and a confidence of 0.95."""


def margin(records: Array | float, confidence: float) -> Array:
    """The distance of a bound from the mean of so many records, in standard deviations, at all numbers of records at
    once.

    One side of the asymptotic confidence sequence (proposition B.1) of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas
    (Annals of Statistics 52, 2024; arXiv:2103.06476).
    """
    grown = np.asarray(records) * RHO2 + 1
    odds = 1 + np.sqrt(grown) / (2 * (1 - confidence))
    distance: Array = np.sqrt(2 * grown * np.log(odds) / RHO2) / records
    return distance


def anytime_bounds(pairs: Pairs, confidence: float, *, largest: float = 0.0) -> Bounds | None:
    """The gain with a bound on either side, each at `confidence` at all looks together; None if it is not a finite
    number.

    `largest` is how much one record can gain, 0 where that is unknown: models that have not differed yet may differ on
    the next record, so the spread is taken as if one more had gained it, and one had lost it.
    """
    count = pairs.num_independent
    if count < 2 or not np.isfinite([pairs.ours, pairs.theirs]).all() or not (pairs.weights > 0).all():
        return None
    gain, error = gain_and_error(pairs)
    width = math.sqrt(error**2 * count + 2 * largest**2 / (count - 1)) * float(margin(count, confidence))
    return Bounds(gain, gain - width, gain + width, error, len(pairs.ours), count)


def records_to_tell(looked: Bounds, distance: float, confidence: float) -> int | None:
    """At about how many records the bounds are this distant from a gain like this one; None for more than a million."""
    counts = np.ceil(np.geomspace(looked.groups, MANY_RECORDS, 500))
    narrower = margin(counts, confidence) / margin(looked.groups, confidence)
    enough = narrower * (looked.upper - looked.gain) <= distance
    return int(counts[enough.argmax()]) if enough.any() else None


def share_bounds(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """The lowest and the highest true share that so many hits do not rule out; both hold at all trials at once, with
    probability 1 - alpha.

    Exact: P(for any n, (n + 1) P(Bin(n, p) = hits) <= alpha) <= alpha (Robbins, Statistical methods related to the law
    of the iterated logarithm, Annals of Mathematical Statistics 41, 1970), a uniform mixture of likelihood ratios.
    """
    least = math.log(alpha) - math.lgamma(trials + 2) + math.lgamma(hits + 1) + math.lgamma(trials - hits + 1)

    def bound(outside: float) -> float:
        inside = hits / trials
        for _ in range(50):
            middle = (inside + outside) / 2
            is_inside = hits * math.log(middle) + (trials - hits) * math.log1p(-middle) > least
            inside, outside = (middle, outside) if is_inside else (inside, middle)
        return outside

    return bound(0.0) if hits else 0.0, bound(1.0) if hits < trials else 1.0
