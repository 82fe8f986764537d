"""Which learning rates a sweep tries next, from the losses so far: a pure function, so a restart changes nothing.

Rates lie on a grid of quarter decades around a centre; the rate at place q is centre x 10^(q/4). First come half
decades, and the grid widens while the best is at an end; then come the quarter decades beside the best.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.config.tune import TuneConfig

HALF = 2
"""Number of places from one half decade to the next."""
PER_DECADE = 4


@dataclass(frozen=True)
class Grid:
    """The learning rates of one method at one rank and batch size."""

    center: float
    rates: tuple[float, ...] = ()
    """The config's own rates, ascending: then no others are tried, and a place is an index; empty for a grid."""
    points: int = 5
    widen: int = 4
    refine: bool = True

    @classmethod
    def of(cls, tune: TuneConfig, center: float) -> "Grid":
        """The grid that the config describes, around the rate `center`."""
        rates = tuple(sorted(set(tune.space.learning_rates)))
        return cls(center, rates, tune.points, tune.widen, tune.refine)

    def rate(self, place: int) -> float:
        """The learning rate at a place; on a grid, rounded to three digits."""
        return self.rates[place] if self.rates else float(f"{self.center * 10 ** (place / PER_DECADE):.3g}")

    @property
    def first(self) -> list[int]:
        """The places that are always tried."""
        reach = HALF * (self.points // 2)
        places = range(len(self.rates)) if self.rates else range(-reach, reach + 1, HALF)
        return [place for place in places if self.rate(place) < 1]

    def wanted(self, losses: Mapping[int, float]) -> list[int]:
        """The places to try next; none when the search is over. `losses` has every outcome so far, infinite for a rate
        at which a training diverged or none succeeded.
        """
        if missing := [place for place in self.first if place not in losses]:
            return missing
        if self.rates:
            return []
        best = best_place(losses)
        for end, step in ((min(losses), -HALF), (max(losses), HALF)):
            limit = (self.first[0] if step < 0 else self.first[-1]) + self.widen * step
            if best == end and end != limit and self.rate(end + step) < 1:
                return [end + step]
        beside = [best - 1, best + 1] if self.refine and best % HALF == 0 and math.isfinite(losses[best]) else []
        return [place for place in beside if place not in losses and min(losses) < place < max(losses)]

    def num_refining(self, losses: Mapping[int, float]) -> int:
        """Number of quarter decades that will probably still be tried, while the best rate is not yet known."""
        is_open = self.refine and not self.rates and bool(wanted := self.wanted(losses))
        return 2 if is_open and all(place % HALF == 0 for place in (*losses, *wanted)) else 0


def best_place(losses: Mapping[int, float]) -> int:
    """The place with the lowest loss; among equals, and where every training diverged, the lowest rate."""
    return min(sorted(losses), key=losses.__getitem__)


def neighbours(losses: Mapping[int, float], place: int) -> tuple[int | None, int | None]:
    """The nearest places below and above that were tried; None where the grid ends."""
    below = max((other for other in losses if other < place), default=None)
    above = min((other for other in losses if other > place), default=None)
    return below, above


def mean(losses: Sequence[float]) -> float:
    """The mean loss of a rate's trainings; infinite where one of them diverged, or where there is none."""
    return sum(losses) / len(losses) if losses else math.inf
