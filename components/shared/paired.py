"""How much better one model is than another on the same records, and how sure that is; pure.

Bounds are one-sided. If every record is right or wrong and independent, they are Tango's score bounds. Otherwise they
come from a studentised bootstrap over groups of records, which allows for few groups and for skewed losses; they are
moved outwards where few large values decide.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 4000
PER_TAIL = 40
"""Minimum number of resamples beyond a bound: a tail of 1 % is not read from a handful."""
MOST_READ = 0.995
"""Highest confidence at which a bound is read from resamples; beyond it, it is scaled outwards as a normal one."""
COUNTS_AT_ONCE = 4_000_000
COUNTS_IN_CACHE = 2**16
"""Number of counts that are converted to floats, half a megabyte, before they are multiplied."""
MAX_LOG = 700.0
POWER = 0.8
FEW = 5
"""Fewer losses than this are too few for a normal distribution of their number (Cochran, Biometrics 10, 1954)."""
LARGE_PART, LARGE_OF_COARSE = 0.75, 0.5
"""The part of a loss from which on it is one of them; the second for marks, of which short answers have few values."""
MANY_RECORDS = 1_000_000


@dataclass(frozen=True)
class Pairs:
    """Two models on the same records. Either's metric is the sum of its values over the sum of the weights."""

    ours: Array
    theirs: Array
    weights: Array
    groups: npt.NDArray[np.int64] | None = None
    """Group of each record, counted from 0 without gaps; None if all records are independent."""
    lower_is_better: bool = False
    exponential: bool = False
    """Whether the metric is the exponential of that mean, as perplexity is of the loss."""
    relative: bool = False
    """Whether the gain is a share of the other model's metric."""

    @property
    def num_independent(self) -> int:
        """Number of groups; without groups, of records."""
        return len(self.ours) if self.groups is None else int(self.groups.max(initial=-1)) + 1

    @property
    def num_effective(self) -> float:
        """Number of records, or groups, of one weight that tell as much as these (Kish, Survey Sampling, 1965)."""
        weights = self.weights if self.groups is None else np.bincount(self.groups, weights=self.weights)
        return float(weights.sum() ** 2 / (weights**2).sum())

    def where(self, kept: npt.NDArray[np.bool_]) -> "Pairs":
        groups = None if self.groups is None else np.unique(self.groups[kept], return_inverse=True)[1]
        return replace(self, ours=self.ours[kept], theirs=self.theirs[kept], weights=self.weights[kept], groups=groups)

    @property
    def are_binary(self) -> bool:
        """Whether every record is right or wrong, and independent of the others."""
        values = np.concatenate([self.ours, self.theirs])
        return (
            not self.relative
            and self.groups is None
            and bool(np.isin(values, (0.0, 1.0)).all() and (self.weights == 1.0).all())
        )


@dataclass(frozen=True)
class Bounds:
    """How much better the candidate is; positive is better, whichever way the metric points.

    In the metric's unit, or, if the pairs are relative, as a share of the other model's metric.
    """

    gain: float
    lower: float
    """The gain is at least this, at the requested confidence."""
    upper: float
    """The gain is at most this, at the requested confidence."""
    error: float
    """Standard error of the gain."""
    records: int
    groups: int
    """Number of independent groups; equals `records` if there are no groups."""


def bounds(pairs: Pairs, confidence: float) -> Bounds | None:
    """Return the gain with a bound on either side, each at `confidence`; None if it is not a finite number."""
    numbers = np.stack([pairs.ours, pairs.theirs, pairs.weights], axis=1)
    if not len(numbers) or not np.isfinite(numbers).all():
        return None
    if pairs.relative and not pairs.theirs.any():
        return None  # a share of nothing
    sums = _summed(pairs)
    gain, error = gain_and_error(pairs)
    if pairs.are_binary:
        lower, upper = score_bounds(*wins_and_losses(pairs), len(numbers), confidence)
    elif error > 0:
        gains, errors = _resampled(pairs, sums, confidence)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A resample of equal groups has no error: its distance is infinite, or zero.
            distances = np.nan_to_num((gains - gain) / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
        read = min(confidence, MOST_READ)
        farther = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(read) if read < confidence else 1.0
        farther *= _widened(_residuals(pairs, sums), NormalDist().inv_cdf(confidence))
        low, high = farther * np.quantile(distances, [1 - read, read], method="nearest")
        lower, upper = gain - high * error, gain - low * error
    else:
        lower = upper = gain
    return Bounds(gain, float(lower), float(upper), error, len(numbers), len(sums))


def gain_and_error(pairs: Pairs) -> tuple[float, float]:
    """Return the gain and its standard error."""
    sums = _summed(pairs)
    gain, error = _gain_and_error(pairs, sums, np.ones((1, len(sums)), np.uint8))
    return float(gain[0]), float(error[0])


def much_worse_unseen(pairs: Pairs) -> float:
    """Return how much lower the gain is expected to be as the tail of the losses extends beyond the records drawn."""
    lost = _residuals(pairs, _summed(pairs)) * (1.0 if pairs.lower_is_better else -1.0)
    return unseen(lost) / float(pairs.weights.sum())


def few_unseen(pairs: Pairs, between: Bounds, loss: float, confidence: float) -> float:
    """Return how much lower than in `found` the gain's bound is as if one more record lost `loss`, where a few do; 0
    where none or many do. In the unit of the gain, as `loss` is.

    Gaffke's bound of a mean (Mathematical Methods of Statistics 14, 2005), with one more record whose length is that of
    a token's record on average; it is Clopper and Pearson's if all others lose nothing.
    """
    sums = _summed(pairs)
    weights, gains = sums[:, 2], _residuals(pairs, sums) * (-1.0 if pairs.lower_is_better else 1.0)
    large = (LARGE_PART if pairs.lower_is_better else LARGE_OF_COARSE) * loss - 1e-9
    if not 1 <= (-gains >= (between.gain + large) * weights).sum() < FEW:
        return 0.0
    low, high = min(-loss, between.gain), between.gain
    for _ in range(40):
        middle = (low + high) / 2
        more = -float((weights**2).sum() / weights.sum()) * (loss + middle)
        chance = chance_below_zero(np.append(gains + weights * (between.gain - middle), more))
        low, high = (low, middle) if chance > 1 - confidence else (middle, high)
    return max(0.0, between.lower - low)


def wins_and_losses(pairs: Pairs) -> tuple[int, int]:
    """Return on how many records only the candidate is right, and on how many only the other model."""
    return int((pairs.ours > pairs.theirs).sum()), int((pairs.ours < pairs.theirs).sum())


def mcnemar(won: int, lost: int) -> float:
    """Return the probability of `lost` or more losses among the records on which two equally good models differ.

    McNemar's test (Psychometrika 12, 1947), exact and one-sided: a tail of the binomial distribution.
    """
    differ = won + lost
    return sum(math.comb(differ, count) for count in range(lost, differ + 1)) / 2**differ


def score_bounds(won: float, lost: float, records: int, confidence: float) -> tuple[float, float]:
    """Return the differences of paired shares that Tango's score test just rejects (Statistics in Medicine 17, 1998).

    At a difference of zero that test is McNemar's.
    """
    quantile = NormalDist().inv_cdf(confidence)

    def score(difference: float) -> float:
        # The maximum likelihood estimate of the share of losses under this difference.
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
    """Whether these wins and losses show that one share is below the other by more than the margin.

    McNemar's exact test has to show that it is below, and Tango's bound that it is so by more than a nonzero margin.
    """
    if mcnemar(won, lost) > 1 - confidence:
        return False
    return margin == 0 or score_bounds(won, lost, records, confidence)[1] < -margin


def records_to_decide(between: Bounds, required: float, confidence: float, power: float = POWER) -> int | None:
    """Return how many records would decide, with this power, on which side of `required` a gain like this lies.

    None if the gain is so near to `required` that no number of records is worth naming.
    """
    distance = abs(between.gain - required)
    normal = NormalDist()
    spread = (normal.inv_cdf(confidence) + normal.inv_cdf(power)) * between.error
    if spread**2 * between.records >= MANY_RECORDS * distance**2:
        return None
    return 10 * math.ceil(between.records * (spread / distance) ** 2 / 10)


def _widened(residuals: Array, quantile: float) -> float:
    """Return how much to widen a studentised bootstrap's bound where few large values of both signs decide: a factor.

    For a mean, such a bound fails more often than asked by (kurtosis - 3/2 skewness^2) / 6n times q (1 + 2 q^2) phi(q),
    where q is the normal quantile (Hall, Annals of Statistics 16, 1988): here as a distance, and never inwards.
    """
    squares = residuals**2
    variance = squares.mean()
    skewness, kurtosis = (residuals * squares).mean() / variance**1.5, (squares**2).mean() / variance**2 - 3
    return 1 + max(0.0, float(kurtosis - 1.5 * skewness**2)) * (1 + 2 * quantile**2) / (6 * len(residuals))


def _residuals(pairs: Pairs, sums: Array) -> Array:
    """Return what each row of `sums` adds to ours less theirs, times the sum of the weights; the parts sum to 0."""
    total = sums.sum(axis=0)
    _, parts = _gains_and_parts(pairs, total[None, :2] / total[2])
    gains: Array = sums @ parts[0]
    return gains


def _summed(pairs: Pairs) -> Array:
    """Return our value, theirs and the weight, a row for each group, or for each record where there are no groups."""
    columns = (pairs.ours, pairs.theirs, pairs.weights)
    return np.stack(
        columns if pairs.groups is None else [np.bincount(pairs.groups, weights=column) for column in columns], axis=1
    )


def _resampled(pairs: Pairs, sums: Array, confidence: float) -> tuple[Array, Array]:
    """Return gain and standard error of each resample of the groups."""
    num_groups, num_resamples = len(sums), max(RESAMPLES, math.ceil(PER_TAIL / (1 - min(confidence, MOST_READ))))
    rows = min(num_resamples, max(1, COUNTS_AT_ONCE // num_groups))
    parts = [_gain_and_error(pairs, sums, _counts(num_groups, rows, seed)) for seed in range(-(-num_resamples // rows))]
    gains, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gains, errors


@lru_cache(maxsize=32)
def _counts(num_groups: int, rows: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return how often each resample, a row with one draw per group, takes each group. All comparisons of a decision
    and of its slices share these resamples, since drawing them is nearly all of what a bound costs.
    """
    # The one random stream that numpy keeps unchanged in every release (NEP 19).
    drawn = np.random.RandomState(seed).randint(0, num_groups, size=(rows, num_groups))
    drawn += np.arange(rows)[:, None] * num_groups
    # A byte is enough: even among more than 255 groups, none is drawn that often.
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.uint8)


def _gain_and_error(pairs: Pairs, sums: Array, counts: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Return the gain and its standard error for each row of `counts`, which says how often each group is taken.

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
    # A variance as small as the rounding errors of equal numbers is none.
    variance = scale + 2 * parts[:, first != second].sum(axis=1)
    variance = np.where(variance > 1e-12 * scale, variance, 0.0) * len(sums) / max(len(sums) - 1, 1)
    sign = -1.0 if pairs.lower_is_better else 1.0
    return sign * gains, np.sqrt(variance) / totals[:, 2]


def _gains_and_parts(pairs: Pairs, means: Array) -> tuple[Array, Array]:
    """Return ours less theirs for each row of two means, and the weights of a record's three numbers in it."""
    values = np.exp(np.minimum(means, MAX_LOG)) if pairs.exponential else means
    gains, outer = values[:, 0] - values[:, 1], np.broadcast_to([1.0, -1.0], values.shape)
    if pairs.relative:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = values[:, 0] / values[:, 1]
            gains, outer = ratios - 1, np.stack([1 / values[:, 1], -ratios / values[:, 1]], axis=1)
    slopes = (values if pairs.exponential else np.ones_like(means)) * outer
    return gains, np.concatenate([slopes, -(slopes * means).sum(axis=1, keepdims=True)], axis=1)


# The cost of losses beyond those drawn: the largest values are taken for the tail of a generalised Pareto distribution,
# whose mean over a threshold is scale / (1 - shape).

FEWEST = 10
"""Values that a tail is judged by."""
SURELY = 2.0
"""Standard errors by which one tail has to be heavier than the other."""
LEAST_SHAPE = -0.5
"""From here on up the standard error of a shape is known."""
HEAVIER, HEAVIEST = 0.25, 0.95
"""A shape is raised by a quarter of its standard error, to 0.95 at most: its estimate is too small as often as not."""


def unseen(values: Array) -> float:
    """By how much the sum falls short of what is expected of its upper tail, where that is heavier than the lower one:
    n (scale / (1 - shape) - mean) of the n values over the threshold.

    A tail is a fifth of all values, at most four times their root; Pareto-smoothed importance sampling takes three
    times (Vehtari et al., JMLR 25, 2024), with which a lognormal of sigma 1.5 fails in more than one in twenty.
    """
    number = min(len(values) // 5, int(np.ceil(4 * np.sqrt(len(values)))))
    over, under = _beyond(values, number), _beyond(-values, number)
    if len(over) < FEWEST:
        return 0.0
    shape, scale = generalised_pareto(over)
    other = generalised_pareto(under)[0] if len(under) >= FEWEST else LEAST_SHAPE
    # Of each (1 + shape) / sqrt(number) (Smith, Annals of Statistics 15, 1987).
    error = np.hypot(1 + shape, 1 + max(other, LEAST_SHAPE)) / np.sqrt(number)
    if not (shape < 1 and shape - other > SURELY * error):  # from a shape of 1 on there is no mean
        return 0.0
    heavier = max(shape, min(shape + HEAVIER * (1 + shape) / np.sqrt(number), HEAVIEST))
    return max(0.0, len(over) * float(scale / (1 - heavier) - over.mean()))


def chance_below_zero(values: Array) -> float:
    """Return the probability that the values, each times an exponential random number of its own, sum to less than 0.

    By the approximation of Lugannani and Rice (Advances in Applied Probability 12, 1980).
    """
    if values.max() <= 0 or values.min() >= 0:
        return float(values.max() <= 0)
    low, high = 1 / values.min(), 1 / values.max()
    for _ in range(50):
        point = (low + high) / 2
        slopes = values / (1 - point * values)
        low, high = (low, point) if slopes.sum() > 0 else (point, high)
    distance = float(np.sign(point) * np.sqrt(max(0.0, 2 * np.log1p(-point * values).sum())))
    scaled, normal = float(point * np.sqrt((slopes**2).sum())), NormalDist()
    if abs(distance) < 1e-4:
        return 0.5
    return normal.cdf(distance) + normal.pdf(distance) * (1 / distance - 1 / scaled)


def _beyond(values: Array, number: int) -> Array:
    """Return by how much the `number` largest values lie above the next largest, in ascending order, without ties."""
    largest = np.sort(values)[-number - 1 :]
    return largest[largest > largest[0]] - largest[0]


def generalised_pareto(over: Array) -> tuple[float, float]:
    """Shape and scale of what lies over a threshold, in ascending order (Zhang and Stephens, Technometrics 51, 2009).

    Their prior lets few values do, and it takes no search. A shape of 0 is an exponential tail, above it a heavier one.
    """
    number = 30 + int(np.sqrt(len(over)))
    quartile = over[int(len(over) / 4 + 0.5) - 1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slopes = 1 / over[-1] + (1 - np.sqrt(number / (np.arange(1, number + 1) - 0.5))) / (3 * quartile)
        shapes = np.log1p(-slopes[:, None] * over).mean(axis=1)
        profile = len(over) * (np.log(-slopes / shapes) - shapes - 1)
        weights = 1 / np.exp(profile - profile[:, None]).sum(axis=1)
        slope = float((slopes * weights).sum() / weights.sum())
        shape = float(np.log1p(-slope * over).mean())
        return shape, float(np.float64(-shape) / slope)
