"""What a sweep does next, from the trials so far, and its findings in the end. No Ray and no I/O.

It is rebuilt from the trials that have ended, so that an interrupted sweep continues where it was.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import MethodConfig, RunConfig
from components.config.tune import TuneConfig
from components.handover.serve_manifest import ServableAs, serving
from components.records.sweep import RateLoss, Trial, Tuned
from components.shared.errors import ConfigError
from ray_jobs.sweeping.verdict import forgotten_by, interval
from ray_jobs.training import train_loop

# What is swept: arms (a method at one rank and batch size), their points, and the config of a point's training.

MEASUREMENTS = 4
"""Minimum number of held-out evaluations per trial: enough to stop it halfway, or when it diverges."""


@dataclass(frozen=True)
class Arm:
    """A method at one rank and batch size, with a learning rate sweep of its own."""

    method: str
    rank: int
    batch_size: int


@dataclass(frozen=True)
class Point:
    """One training of an arm."""

    arm: Arm
    learning_rate: float
    seed: int
    compares: bool = False
    """Whether it belongs to the comparison of methods."""

    @property
    def name(self) -> str:
        """Name of the point, unique within a sweep; its trial's record has the same name."""
        arm = self.arm
        return f"{arm.method}-r{arm.rank}-b{arm.batch_size}-{self.learning_rate:.3g}-s{self.seed}"


def swept_arms(config: RunConfig) -> Iterator[Arm]:
    """Yield the arms that the config sweeps, sorted by the format of their base, so that it is loaded rarely.

    Raises:
        ConfigError: an arm has no legal config.
    """
    names = config.tune.methods or [config.method.name]
    for name in sorted(dict.fromkeys(names), key=lambda name: METHODS[name].base):
        method = _method(config, name)
        for rank in config.tune.space.ranks or [method.r]:
            for batch_size in config.tune.space.batch_sizes or [config.train.batch_size]:
                arm = Arm(name, rank, batch_size)
                at_rate(config, arm, prior_rate(config, arm))
                yield arm


def prior_rate(config: RunConfig, arm: Arm) -> float:
    """The learning rate to search around: the config's; for another method, scaled by the methods' relative rates."""
    relative = METHODS[arm.method].relative_rate / METHODS[config.method.name].relative_rate
    return float(f"{min(config.learning_rate * (1 if arm.method == config.method.name else relative), 0.1):.3g}")


def at_rate(config: RunConfig, arm: Arm, learning_rate: float) -> RunConfig:
    """The config of a run that trains the arm at a learning rate.

    Raises:
        ConfigError: it is no legal config.
    """
    method = _method(config, arm.method)
    rank = {} if arm.rank == method.r else {"rank": arm.rank}
    train = {"learning_rate": learning_rate, "batch_size": arm.batch_size}
    return _checked(
        config.model_copy(
            update={
                "method": method.model_copy(update=rank),
                "train": config.train.model_copy(update=train),
            }
        ),
        f"sweeping {arm.method}",
    )


def trial_config(config: RunConfig, point: Point, num_records: int) -> RunConfig:
    """The config of a point's training: like a run's, but on one worker, which holds the whole base.

    Neither the number of workers nor ZeRO-3 changes the optimizer steps.
    """
    run = at_rate(config, point.arm, point.learning_rate)
    train = run.train.model_copy(
        update={
            "seed": point.seed,
            "max_steps": config.tune.max_steps or run.train.max_steps,
            "checkpoint_every_steps": 0,
            "zero_stage": min(run.train.zero_stage, 2),
        }
    )
    per_epoch, total = math.ceil(num_records / train.batch_size), train_loop.num_steps(train, num_records)
    often = max(train.evals_per_epoch, math.ceil(per_epoch * MEASUREMENTS / total))
    return run.model_copy(
        update={
            "train": train.model_copy(update={"evals_per_epoch": often}),
            "ray": run.ray.model_copy(update={"num_workers": 1}),
            "tune": TuneConfig(),
        }
    )


def servable_as(config: RunConfig, arm: Arm) -> ServableAs:
    """How an arm's adapters can be served, as far as the method determines it."""
    return serving(_method(config, arm.method).row, rank=arm.rank, target_modules=()).servable_as


def _method(config: RunConfig, name: str) -> MethodConfig:
    """The method by its name: the config's own as it is, another with its own default rank and axes."""
    own = config.method
    if name == own.name:
        return own
    shared = {"dropout": own.dropout, "target_modules": own.target_modules, "loftq_steps": own.loftq_steps}
    return MethodConfig.model_validate({"name": name, **shared})


def _checked(config: RunConfig, doing: str) -> RunConfig:
    try:
        return config_file.loads(config_file.dumps(config))
    except ConfigError as exc:
        raise ConfigError(f"{doing}: {str(exc).removeprefix('config: ')}") from exc


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
        self._grids = {arm: Grid.of(config.tune, prior_rate(config, arm)) for arm in arms}
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
            forgotten=forgotten_by(self.seeds_of(arm), self.trials.values()),
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
