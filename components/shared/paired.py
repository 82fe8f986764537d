"""How much better one model is than another on the same records, and how sure that is; pure.

Bounds are one-sided. Where every record is right or wrong and stands for itself, they are Tango's score bounds; else
those of a bootstrap over groups of records, studentised, which allows for few groups and for skewed losses, and farther
off where few large values decide.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from components.shared import tails

Array = npt.NDArray[np.float64]

RESAMPLES = 4000
PER_TAIL = 40
"""Resamples beyond a bound, at least: a tail of 1 % is not read from a handful."""
MOST_READ = 0.995
"""Beyond this, a bound is not read from resamples, but is as much farther off as a normal one would be."""
COUNTS_AT_ONCE = 4_000_000
COUNTS_IN_CACHE = 2**16
"""As floats, half a megabyte: no more are converted before they are multiplied."""
MAX_LOG = 700.0
POWER = 0.8
MANY_RECORDS = 1_000_000


@dataclass(frozen=True)
class Pairs:
    """Two models on the same records. Either's metric is the sum of its values over the sum of the weights."""

    ours: Array
    theirs: Array
    weights: Array
    groups: npt.NDArray[np.int64] | None = None
    """Which records go together, counted from 0 without gaps; None where each stands for itself."""
    lower_is_better: bool = False
    exponential: bool = False
    """Whether the metric is the exponential of that mean, as perplexity is of the loss."""
    relative: bool = False
    """Whether the gain is a share of the other model's metric."""

    @property
    def num_independent(self) -> int:
        """Groups, or else records."""
        return len(self.ours) if self.groups is None else int(self.groups.max(initial=-1)) + 1

    def where(self, kept: npt.NDArray[np.bool_]) -> "Pairs":
        """Some of the records."""
        groups = None if self.groups is None else np.unique(self.groups[kept], return_inverse=True)[1]
        return replace(self, ours=self.ours[kept], theirs=self.theirs[kept], weights=self.weights[kept], groups=groups)

    @property
    def are_binary(self) -> bool:
        """Whether every record is right or wrong, and stands for itself."""
        values = np.concatenate([self.ours, self.theirs])
        return (
            not self.relative
            and self.groups is None
            and bool(np.isin(values, (0.0, 1.0)).all() and (self.weights == 1.0).all())
        )


@dataclass(frozen=True)
class Bounds:
    """How much better the candidate is; positive is better, whichever way the metric points.

    In the metric's own unit, or, where pairs are relative, as a share of the other model's.
    """

    gain: float
    lower: float
    """The gain is at least this, with the confidence asked for."""
    upper: float
    """The gain is at most this, with the same."""
    error: float
    """Standard error of the gain."""
    records: int
    groups: int
    """Independent ones; as many as records, where none go together."""


def bounds(pairs: Pairs, confidence: float) -> Bounds | None:
    """The gain with a bound on either side, each kept with `confidence`; None where it is no finite number."""
    numbers = np.stack([pairs.ours, pairs.theirs, pairs.weights], axis=1)
    if not len(numbers) or not np.isfinite(numbers).all():
        return None
    if pairs.relative and not pairs.theirs.any():
        return None  # a share of nothing
    sums = numbers if pairs.groups is None else _summed(numbers, pairs.groups)
    once = np.ones((1, len(sums)), np.uint8)
    gain, error = (float(value[0]) for value in _gain_and_error(pairs, sums, once))
    if pairs.are_binary:
        lower, upper = score_bounds(*wins_and_losses(pairs), len(numbers), confidence)
    elif error > 0:
        gains, errors = _resampled(pairs, sums, confidence)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A resample of like groups has no error: it is as far off as can be, or not at all.
            distances = np.nan_to_num((gains - gain) / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
        read = min(confidence, MOST_READ)
        farther = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(read) if read < confidence else 1.0
        farther *= _widened(_residuals(pairs, sums), NormalDist().inv_cdf(confidence))
        low, high = farther * np.quantile(distances, [1 - read, read], method="nearest")
        lower, upper = gain - high * error, gain - low * error
    else:
        lower = upper = gain
    return Bounds(gain, float(lower), float(upper), error, len(numbers), len(sums))


def much_worse_unseen(pairs: Pairs) -> float:
    """How much lower the gain is to be expected where the tail of what records lose goes on beyond those drawn.

    In the unit of the gain, and never below 0; see `tails`.
    """
    numbers = np.stack([pairs.ours, pairs.theirs, pairs.weights], axis=1)
    sums = numbers if pairs.groups is None else _summed(numbers, pairs.groups)
    lost = _residuals(pairs, sums) * (1.0 if pairs.lower_is_better else -1.0)
    return tails.unseen(lost) / float(pairs.weights.sum())


def wins_and_losses(pairs: Pairs) -> tuple[int, int]:
    """On how many records the candidate alone is right, and on how many the other alone."""
    return int((pairs.ours > pairs.theirs).sum()), int((pairs.ours < pairs.theirs).sum())


def mcnemar(won: int, lost: int) -> float:
    """The chance to lose so many, or more, of the records on which two equally good models differ.

    McNemar's test (Psychometrika 12, 1947), exact and one-sided: a tail of the binomial distribution.
    """
    differ = won + lost
    return sum(math.comb(differ, count) for count in range(lost, differ + 1)) / 2**differ


def score_bounds(won: int, lost: int, records: int, confidence: float) -> tuple[float, float]:
    """The differences between two paired shares that Tango's score test just rejects (Statistics in Medicine 17, 1998).

    At a difference of zero that test is McNemar's.
    """
    quantile = NormalDist().inv_cdf(confidence)

    def score(difference: float) -> float:
        # The share of losses that is most likely under this difference.
        linear = (2 * records - won + lost) * difference - won - lost
        constant = -lost * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 - 8 * records * constant, 0.0)) - linear) / (4 * records)
        distance = won - lost - records * difference
        variance = records * (2 * share + difference * (1 - difference))
        if variance > 0:
            return distance / math.sqrt(variance)
        return math.copysign(math.inf, distance) if distance else 0.0

    def where(target: float, low: float, high: float) -> float:
        for _ in range(60):  # the score falls as the difference grows
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    gain = (won - lost) / records
    return where(quantile, -1.0, gain), where(-quantile, gain, 1.0)


def shown_worse(won: int, lost: int, records: int, margin: float, confidence: float) -> bool:
    """Whether so many wins and losses show that one share is below the other by more than the margin.

    By McNemar's exact test that it is below, and by Tango's bound that it is so by more than a margin above zero.
    """
    if mcnemar(won, lost) > 1 - confidence:
        return False
    return margin == 0 or score_bounds(won, lost, records, confidence)[1] < -margin


def least_loss(records: int, margin: float, confidence: float) -> int | None:
    """The smallest loss that shows, of a model that wins nothing; None where so few records show none.

    With a margin of zero it is the smallest k with 1 / 2^k <= 1 - confidence, the whole tail of McNemar's test.
    """
    return next((lost for lost in range(1, records + 1) if shown_worse(0, lost, records, margin, confidence)), None)


def records_to_decide(found: Bounds, required: float, confidence: float) -> int | None:
    """How many records would decide in four cases of five, if the gain is what it is here, on which side of `required`.

    None where the gain is so near to it that no number of records is worth naming.
    """
    distance = abs(found.gain - required)
    normal = NormalDist()
    spread = (normal.inv_cdf(confidence) + normal.inv_cdf(POWER)) * found.error
    if spread**2 * found.records >= MANY_RECORDS * distance**2:
        return None
    return 10 * math.ceil(found.records * (spread / distance) ** 2 / 10)


def _widened(residuals: Array, quantile: float) -> float:
    """By how much farther off a studentised bootstrap's bound has to be where few large values of both signs decide.

    Of a mean, such a bound fails more often than asked by (kurtosis - 3/2 skewness^2) / 6n of q (1 + 2 q^2) phi(q),
    where q is the normal quantile (Hall, Annals of Statistics 16, 1988): here as a distance, and never nearer.
    """
    squares = residuals**2
    variance = squares.mean()
    skewness, kurtosis = (residuals * squares).mean() / variance**1.5, (squares**2).mean() / variance**2 - 3
    return 1 + max(0.0, float(kurtosis - 1.5 * skewness**2)) * (1 + 2 * quantile**2) / (6 * len(residuals))


def _residuals(pairs: Pairs, sums: Array) -> Array:
    """What each row of sums adds to the gain, as ours less theirs, times the sum of the weights; they sum to 0."""
    total = sums.sum(axis=0)
    _, parts = _gains_and_parts(pairs, total[None, :2] / total[2])
    found: Array = sums @ parts[0]
    return found


def _summed(numbers: Array, groups: npt.NDArray[np.int64]) -> Array:
    return np.stack([np.bincount(groups, weights=column) for column in numbers.T], axis=1)


def _resampled(pairs: Pairs, sums: Array, confidence: float) -> tuple[Array, Array]:
    """Gain and standard error of each resample of the groups."""
    num_groups, num_resamples = len(sums), max(RESAMPLES, math.ceil(PER_TAIL / (1 - min(confidence, MOST_READ))))
    rows = min(num_resamples, max(1, COUNTS_AT_ONCE // num_groups))
    parts = [_gain_and_error(pairs, sums, _counts(num_groups, rows, seed)) for seed in range(-(-num_resamples // rows))]
    gains, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gains, errors


@lru_cache(maxsize=32)
def _counts(num_groups: int, rows: int, seed: int) -> npt.NDArray[np.uint8]:
    """How often each resample takes each group: rows of as many draws as there are groups. All comparisons of a
    decision, and of its slices, take their resamples from here, and to draw them is nearly all of what a bound costs.
    """
    # Of numpy's streams of random numbers, this one stays as it is in every release (NEP 19).
    drawn = np.random.RandomState(seed).randint(0, num_groups, size=(rows, num_groups))
    drawn += np.arange(rows)[:, None] * num_groups
    # A byte is enough: of more groups than it counts, none is drawn as often as that.
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.uint8)


def _gain_and_error(pairs: Pairs, sums: Array, counts: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Of each row of `counts`, how often every group is taken, the gain and its standard error.

    A mean over tokens is a ratio of two sums, whose error is that of the residuals (Cochran, Sampling Techniques, 3rd
    edition, equation 6.13).
    """
    first, second = np.triu_indices(3)
    columns = np.concatenate([sums, sums[:, first] * sums[:, second]], axis=1)
    blocks = np.array_split(counts, -(-counts.size // COUNTS_IN_CACHE))
    moments = np.concatenate([block.astype(np.float64) @ columns for block in blocks])
    totals, squares = moments[:, :3], moments[:, 3:]
    gains, residual = _gains_and_parts(pairs, totals[:, :2] / totals[:, 2:])
    parts = residual[:, first] * residual[:, second] * squares
    scale = parts[:, first == second].sum(axis=1)
    # Below what rounding leaves of equal numbers there is no variance.
    variance = scale + 2 * parts[:, first != second].sum(axis=1)
    variance = np.where(variance > 1e-12 * scale, variance, 0.0) * len(sums) / max(len(sums) - 1, 1)
    sign = -1.0 if pairs.lower_is_better else 1.0
    return sign * gains, np.sqrt(variance) / totals[:, 2]


def _gains_and_parts(pairs: Pairs, means: Array) -> tuple[Array, Array]:
    """Of each row of two means, ours less theirs, and what a record's three numbers weigh in it."""
    values = np.exp(np.minimum(means, MAX_LOG)) if pairs.exponential else means
    gains, outer = values[:, 0] - values[:, 1], np.broadcast_to([1.0, -1.0], values.shape)
    if pairs.relative:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = values[:, 0] / values[:, 1]
            gains, outer = ratios - 1, np.stack([1 / values[:, 1], -ratios / values[:, 1]], axis=1)
    slopes = (values if pairs.exponential else np.ones_like(means)) * outer
    return gains, np.concatenate([slopes, -(slopes * means).sum(axis=1, keepdims=True)], axis=1)
