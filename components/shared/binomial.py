"""How large a share may be of which so many were seen: exact, by Clopper and Pearson (Biometrika 26, 1934); pure."""

import math

STEPS = 60
"""Of bisection: a share to the last digit of a float."""


def at_most(seen: int, of: int, share: float) -> float:
    """The chance to see so many, or fewer, of so many where the share is this."""
    if share >= 1.0:
        return float(seen >= of)
    if share <= 0.0:
        return 1.0
    logs = [_log_choose(of, k) + k * math.log(share) + (of - k) * math.log1p(-share) for k in range(seen + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))


def upper(seen: int, of: int, confidence: float) -> float:
    """The share is at most this, with the confidence asked for."""
    low, high = seen / of, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(seen, of, middle) > 1 - confidence else (low, middle)
    return high


def lower(seen: int, of: int, confidence: float) -> float:
    """The share is at least this, with the same."""
    return 1 - upper(of - seen, of, confidence)


def least_of(seen: int, share: float, confidence: float) -> int:
    """The fewest of which one may see so many and still be sure that no more than this share is like them."""
    low, high = seen, max(1, seen)
    while at_most(seen, high, share) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at_most(seen, middle, share) > 1 - confidence else (low, middle)
    return high


def _log_choose(of: int, seen: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(seen + 1) - math.lgamma(of - seen + 1)
