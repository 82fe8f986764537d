"""Multiple comparisons with one error rate for all of them together; pure.

Holm's procedure (Scandinavian Journal of Statistics 6, 1979): the more comparisons, the higher the confidence of each.
"""

from collections.abc import Callable


def level(confidence: float, comparisons: int) -> float:
    """The confidence that each of this many comparisons needs, for `confidence` in all of them together."""
    return 1 - (1 - confidence) / comparisons


def found(comparisons: int, confidence: float, shows: Callable[[int, float], bool]) -> set[int]:
    """The indices of the significant comparisons; `shows(index, level)` tells whether one is significant at a level.

    First all comparisons share the error rate, then only those that no earlier step has found.
    """
    result: set[int] = set()
    while len(result) < comparisons:
        at = level(confidence, comparisons - len(result))
        more = {index for index in range(comparisons) if index not in result and shows(index, at)}
        if not more:
            break
        result |= more
    return result
