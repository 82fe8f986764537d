"""What a heavy tail has beyond what was drawn of it; pure.

A mean over skewed values is most often too low: the rare large ones were not drawn, and neither was their spread, so
that no bound from the sample itself knows of them. The largest values are taken for those of a generalised Pareto
distribution, as extreme value theory has it, whose mean is known.
"""

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FEWEST = 10
"""Values that a tail is judged by."""
SURELY = 2.0
"""Standard errors by which one tail has to be heavier than the other."""
LEAST_SHAPE = -0.5
"""From here on up the standard error of a shape is known."""
HEAVIER, HEAVIEST = 0.25, 0.95
"""By how many of its standard errors a shape is taken to be heavier than it was found, but for no heavier than this:
with a quarter, a lognormal of sigma 1.5 keeps one in twenty at 300 records."""


def unseen(values: Array) -> float:
    """By how much the sum falls short of what is expected of its upper tail, where that is heavier than the lower one.

    A tail is a fifth of all values, at most four times their root; Pareto-smoothed importance sampling takes three
    times (Vehtari et al., JMLR 25, 2024), with which a lognormal of sigma 1.5 fails in more than one in twenty.
    One with a shape of 1 or more has no mean: that is no tail, but some values that are far from all others, and the
    sample shows how many they are. What tails that are alike lack is about the same, and the sum knows of neither.
    Since a shape that was found too small is what makes a bound fail, it is taken `HEAVIER`.
    """
    number = min(len(values) // 5, int(np.ceil(4 * np.sqrt(len(values)))))
    over, under = _beyond(values, number), _beyond(-values, number)
    if len(over) < FEWEST:
        return 0.0
    shape, scale = generalised_pareto(over)
    other = generalised_pareto(under)[0] if len(under) >= FEWEST else LEAST_SHAPE
    # Of each (1 + shape) / sqrt(number) (Smith, Annals of Statistics 15, 1987).
    error = np.hypot(1 + shape, 1 + max(other, LEAST_SHAPE)) / np.sqrt(number)
    if not (shape < 1 and shape - other > SURELY * error):
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
