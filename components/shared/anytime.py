"""A bound of a mean that may be looked at after every record, and acted on at any look; pure.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Time-uniform central limit theory
and asymptotic confidence sequences, Annals of Statistics 52, 2024; arXiv:2103.06476): with n values of mean m and
standard deviation s, m - s * margin(n) is below the true mean at all n at once, with probability 1 - alpha. An ordinary
bound that is read every night is wrong some night in far more than alpha of all years.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from components.shared.paired import Array

MOST_RECORDS = 10_000_000


Number = TypeVar("Number", float, Array)


def margin(records: Number, rho2: Number, alpha: float, *, sides: int = 1) -> Number:
    """The distance of the bound from the mean, in standard deviations: theorem 2.2 for two sides, proposition B.1 for
    one. `rho2` is the square of the paper's rho: it says at which number of records the bound is tightest."""
    grown = records * rho2 + 1
    odds = np.sqrt(grown) / alpha if sides == 2 else 1 + np.sqrt(grown) / (2 * alpha)
    distance: Number = np.sqrt(2 * grown / (records**2 * rho2) * np.log(odds))
    return distance


def rho2_for(drop: Number, alpha: float) -> Number:
    """The `rho2` of a one-sided bound that is tightest at the number of records at which it shows `drop`, a mean in
    standard deviations.

    At n records rho^2 = a / n is best, with a = -2 log(2 alpha) + log(1 - 2 log(2 alpha)) (section 2.3 of the paper,
    with 2 alpha for one side); the margin there is c / sqrt(n), which is `drop` at n = (c / drop)^2.
    """
    best = -2 * math.log(2 * alpha)
    best += math.log(1 + best)
    return best * (drop / margin(1.0, best, alpha)) ** 2


@dataclass(frozen=True)
class Moments:
    """Count, means and sums of squares around them of pairs (gain, weight); those of two samples add up (Chan, Golub
    and LeVeque, The American Statistician 37, 1983)."""

    count: int = 0
    gain: float = 0.0
    weight: float = 0.0
    gains: float = 0.0
    both: float = 0.0
    weights: float = 0.0

    @classmethod
    def of(cls, gains: Array, weights: Array) -> "Moments":
        if not len(gains):
            return cls()
        gain, weight = float(gains.mean()), float(weights.mean())
        x, y = gains - gain, weights - weight
        return cls(len(gains), gain, weight, float(np.dot(x, x)), float(np.dot(x, y)), float(np.dot(y, y)))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        x, y, shared = other.gain - self.gain, other.weight - self.weight, self.count * other.count / count
        return Moments(
            count,
            self.gain + x * other.count / count,
            self.weight + y * other.count / count,
            self.gains + other.gains + x * x * shared,
            self.both + other.both + x * y * shared,
            self.weights + other.weights + y * y * shared,
        )

    @cached_property
    def mean(self) -> float:
        """The gains over the weights, as a loss per token is."""
        return self.gain / self.weight

    def spread(self, largest: float = 0.0) -> float:
        """The standard deviation of one pair's part in `mean` (the delta method's: section 4 of the paper has sequences
        of estimators that are such means in the limit). As if one pair more had gained `largest`, and one lost it:
        models that have not differed yet may differ on the next record."""
        squares = self.gains - 2 * self.mean * self.both + self.mean**2 * self.weights
        return math.sqrt((squares / self.weight**2 + 2 * largest**2) / max(1, self.count - 1))


def records_for(distance: float, rho2: float, alpha: float) -> int | None:
    """The fewest records at which the one-sided margin is at most `distance`; None for more than ten million."""
    low, high = 0, 1
    while margin(high, rho2, alpha) > distance:
        low, high = high, 2 * high
        if high > MOST_RECORDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if margin(middle, rho2, alpha) > distance else (low, middle)
    return high


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
