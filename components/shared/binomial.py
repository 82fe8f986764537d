"""Exact confidence bounds of a binomial share, by Clopper and Pearson (Biometrika 26, 1934); pure."""

import math


def at_most(seen: int, of: int, share: float) -> float:
    """Return the probability of `seen` or fewer successes in `of` trials, if the true share is `share`."""
    if share >= 1.0:
        return float(seen >= of)
    if share <= 0.0:
        return 1.0
    choose = [math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) for k in range(seen + 1)]
    logs = [choose[k] + k * math.log(share) + (of - k) * math.log1p(-share) for k in range(seen + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def upper(seen: int, of: int, confidence: float) -> float:
    """Return the upper bound of the share, at `confidence`."""
    low, high = seen / of, 1.0
    for _ in range(60):  # to the last digit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(seen, of, middle) > 1 - confidence else (low, middle)
    return high


def lower(seen: int, of: int, confidence: float) -> float:
    """Return the lower bound of the share, at `confidence`."""
    return 1 - upper(of - seen, of, confidence)


def least_without(share: float, confidence: float) -> int:
    """Return the fewest trials without a success that show, at `confidence`, a true share of at most `share`."""
    return 1 if share >= 1 else max(1, math.ceil(math.log(1 - confidence) / math.log1p(-share)))
