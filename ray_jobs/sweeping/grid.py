"""Which rates a sweep tries next, from the losses that it knows: pure, and the same after a restart.

Rates lie on a grid of quarter decades around a centre. Each is identified by its place on it: q is centre x 10^(q/4).
First come half decades, which widen while the best is at an end; then the quarter decades beside the best.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.config.tune import TuneConfig

HALF = 2
"""Places between half decades."""
PER_DECADE = 4


@dataclass(frozen=True)
class Grid:
    """The rates of one method at one rank and batch size."""

    center: float
    rates: tuple[float, ...] = ()
    """The config's own rates, ascending, which are then all there is; a place is then an index."""
    points: int = 5
    widen: int = 4
    refine: bool = True

    @classmethod
    def of(cls, tune: TuneConfig, center: float) -> "Grid":
        """As the config says, around a rate."""
        rates = tuple(sorted(set(tune.space.learning_rates)))
        return cls(center, rates, tune.points, tune.widen, tune.refine)

    def rate(self, place: int) -> float:
        """The rate there, in three digits."""
        return self.rates[place] if self.rates else float(f"{self.center * 10 ** (place / PER_DECADE):.3g}")

    @property
    def first(self) -> list[int]:
        """The places that are tried whatever comes of them."""
        reach = HALF * (self.points // 2)
        places = range(len(self.rates)) if self.rates else range(-reach, reach + 1, HALF)
        return [place for place in places if self.rate(place) < 1]

    def wanted(self, losses: Mapping[int, float]) -> list[int]:
        """The places to try next; none when the search is over. `losses` has every outcome so far, infinite for a rate
        at which no training ended well.
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
        """How many quarter decades are to be expected beside a best rate that is not known yet."""
        is_open = self.refine and not self.rates and bool(wanted := self.wanted(losses))
        return 2 if is_open and all(place % HALF == 0 for place in (*losses, *wanted)) else 0


def best_place(losses: Mapping[int, float]) -> int:
    """Where the loss is lowest; of equals, and where every training diverged, the lowest rate."""
    return min(sorted(losses), key=losses.__getitem__)


def neighbours(losses: Mapping[int, float], place: int) -> tuple[int | None, int | None]:
    """The nearest places below and above that were tried; None where the grid ends."""
    below = max((other for other in losses if other < place), default=None)
    above = min((other for other in losses if other > place), default=None)
    return below, above


def mean(losses: Sequence[float]) -> float:
    """Of a rate's trainings; infinite where one of them diverged, or where none ended well."""
    return sum(losses) / len(losses) if losses else math.inf
