"""Several comparisons with one error rate for all together; pure.

Holm's procedure (Scandinavian Journal of Statistics 6, 1979): the more comparisons, the higher the confidence of each.
"""

from collections.abc import Callable


def level(confidence: float, comparisons: int) -> float:
    """How sure each of so many has to be."""
    return 1 - (1 - confidence) / comparisons


def found(comparisons: int, confidence: float, shows: Callable[[int, float], bool]) -> set[int]:
    """The comparisons that are significant; `shows` says it of one at a level.

    First all of them share the error rate, then those that no earlier step has found.
    """
    result: set[int] = set()
    while len(result) < comparisons:
        at = level(confidence, comparisons - len(result))
        more = {index for index in range(comparisons) if index not in result and shows(index, at)}
        if not more:
            break
        result |= more
    return result
