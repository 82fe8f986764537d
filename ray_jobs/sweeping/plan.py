"""What a sweep does next, from the trials so far, and its findings in the end. No Ray and no I/O.

It is rebuilt from the trials that have ended, so that an interrupted sweep continues where it was.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from components.config.schema import RunConfig
from components.config.tune import TuneConfig
from components.records.sweep import RateLoss, Trial, Tuned
from ray_jobs.sweeping import points
from ray_jobs.sweeping.forgetting import forgotten
from ray_jobs.sweeping.points import Arm, Point
from ray_jobs.sweeping.verdict import interval

# Which learning rates a sweep tries next, from the losses so far: a pure function, so a restart changes nothing.
#
# Rates lie on a grid of quarter decades around a centre; the rate at place q is centre x 10^(q/4). First come half
# decades, and the grid widens while the best is at an end; then come the quarter decades beside the best.

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


class Plan:
    """The points to try, handed out one by one, and the trials that resulted from them."""

    def __init__(self, config: RunConfig, arms: Sequence[Arm], ended: Iterable[Trial] = ()) -> None:
        self._config = config
        self._grids = {arm: Grid.of(config.tune, points.prior(config, arm)) for arm in arms}
        self._begun: set[str] = set()
        self.trials: dict[str, Trial] = {}
        for trial in ended:
            if trial.is_outcome:
                self.add(trial)

    @property
    def compares(self) -> bool:
        """Whether several methods are compared in the end."""
        return len({arm.method for arm in self._grids}) > 1

    def next(self) -> Point | Literal["wait", "done"]:
        """The next point to start; "wait" where that depends on running trials, "done" at the end."""
        for point in self._open():
            if point.name not in self._begun:
                self._begun.add(point.name)
                return point
        return "wait" if self._begun - self.trials.keys() else "done"

    def add(self, trial: Trial) -> None:
        """Add a trial that has ended, whatever its outcome."""
        self._begun.add(trial.name)
        self.trials[trial.name] = trial

    @property
    def num_to_come(self) -> int:
        """Number of trials that have not ended yet, as far as is known: a grid that widens adds more, and a method
        whose trainings all diverge is not compared."""
        tune = self._config.tune
        searching = sum(
            len(self._searching(arm)) + each.num_refining(self.losses(arm)) * tune.seeds
            for arm, each in self._grids.items()
        )
        if not self.compares:
            return searching
        num_methods = len({arm.method for arm in self._grids})
        compared = sum(trial.compares for trial in self.trials.values())
        return searching + num_methods * tune.compare_seeds - compared

    def _open(self) -> Iterable[Point]:
        """All points that are wanted now and whose trials have not ended."""
        searching = {arm: self._searching(arm) for arm in self._grids}
        for wanted in searching.values():
            yield from wanted
        if self.compares:
            for arm in self.contenders(a for a in self._grids if not self._is_under_way(a.method, searching)):
                for point in self._compared(arm):
                    if point.name not in self.trials:
                        yield point

    def _is_under_way(self, method: str, searching: Mapping[Arm, Sequence[Point]]) -> bool:
        return any(wanted for arm, wanted in searching.items() if arm.method == method)

    def _searching(self, arm: Arm) -> list[Point]:
        wanted = self._grids[arm].wanted(self.losses(arm))
        return [point for place in wanted for point in self._at(arm, place) if point.name not in self.trials]

    def _at(self, arm: Arm, place: int) -> list[Point]:
        first, rate = self._config.train.seed, self._grids[arm].rate(place)
        return [Point(arm, rate, first + number) for number in range(self._config.tune.seeds)]

    def _compared(self, arm: Arm) -> list[Point]:
        tune, first = self._config.tune, self._config.train.seed
        rate = self._grids[arm].rate(best_place(self.losses(arm)))
        return [Point(arm, rate, first + tune.seeds + number, compares=True) for number in range(tune.compare_seeds)]

    def losses(self, arm: Arm) -> dict[int, float]:
        """The mean loss at each place whose trials have all ended; infinite where one diverged, or all failed."""
        reach = HALF * (self._config.tune.points // 2 + self._config.tune.widen)
        rates = self._grids[arm].rates
        found = {}
        for place in range(len(rates)) if rates else range(-reach - 1, reach + 2):
            trials = [self.trials.get(point.name) for point in self._at(arm, place)]
            if all(trial is not None for trial in trials):
                known = [trial for trial in trials if trial is not None and trial.is_outcome]
                found[place] = mean([math.inf if t.loss is None else t.loss for t in known])
        return found

    def contenders(self, arms: Iterable[Arm]) -> list[Arm]:
        """The best arm (rank and batch size) of each method; methods whose trainings all diverged have none."""
        best: dict[str, Arm] = {}
        for arm in arms:
            loss = min(self.losses(arm).values(), default=math.inf)
            if math.isfinite(loss):
                held = best.get(arm.method)
                if held is None or loss < min(self.losses(held).values()):
                    best[arm.method] = arm
        return list(best.values())

    def seeds_of(self, arm: Arm) -> list[Trial]:
        """The finished trials of the arm in the comparison of methods, in the order of their seeds."""
        trials = [self.trials.get(point.name) for point in self._compared(arm)]
        return [trial for trial in trials if trial is not None and trial.status == "finished"]

    def found(self, arm: Arm, memory_bytes: int | None = None) -> Tuned | None:
        """The sweep's result for the arm; None where no rate has a finite loss."""
        losses = self.losses(arm)
        best = best_place(losses) if losses else 0
        if not math.isfinite(losses.get(best, math.inf)):
            return None
        rates = {place: self._rate_loss(arm, place, losses[place]) for place in sorted(losses)}
        below, above = neighbours(losses, best)
        center = self._grids[arm].center
        prior = next((loss for place, loss in losses.items() if self._grids[arm].rate(place) == center), math.inf)
        steps = [t.step_s for point in self._at(arm, best) if (t := self.trials[point.name]).step_s]
        return Tuned(
            method=arm.method,
            rank=arm.rank,
            batch_size=arm.batch_size,
            prior=center,
            learning_rate=rates[best].learning_rate,
            loss=losses[best],
            below=None if below is None else rates[below],
            above=None if above is None else rates[above],
            is_inside=below is not None and above is not None,
            gain_over_prior=prior - losses[best] if math.isfinite(prior) else None,
            rates=list(rates.values()),
            step_s=min(steps, default=None),
            memory_bytes=memory_bytes,
            forgotten=forgotten(self.seeds_of(arm), self.trials.values()),
        )

    def _rate_loss(self, arm: Arm, place: int, loss: float) -> RateLoss:
        trials = [self.trials[point.name] for point in self._at(arm, place)]
        ends = None
        if all(len(trial.record_nll) > 1 for trial in trials):  # a single record has no variance
            ends = interval([trial.record_nll for trial in trials], trials[0].record_tokens)[1:]
        return RateLoss(
            learning_rate=self._grids[arm].rate(place),
            loss=loss if math.isfinite(loss) else None,
            statuses=[trial.status for trial in trials],
            ci95=ends,
        )
