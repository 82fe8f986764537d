"""What a sweep tries next, from the trials so far, and its findings in the end. No Ray and no I/O.

It is rebuilt from the trials that have ended, so that an interrupted sweep continues where it was.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import MethodConfig, RunConfig
from components.config.train import TuneConfig
from components.handover.serve_manifest import ServableAs, serving
from components.records.sweep import RateLoss, Trial, Tuned
from components.shared.errors import ConfigError
from ray_jobs.sweeping.verdict import forgotten_by, interval
from ray_jobs.training import train_loop

MEASUREMENTS = 4
"""Minimum number of held-out evaluations per trial: enough to stop it halfway, or when it diverges."""
COMPARE_SEEDS = 3
"""Further trainings of each compared method at its best rate, with seeds that its search has not seen."""


@dataclass(frozen=True)
class Point:
    """One training of a method."""

    name: str
    """Unique within a sweep; its trial's record has the same name."""
    method: str
    learning_rate: float
    seed: int
    compares: bool = False


def point_of(config: RunConfig, method: str, learning_rate: float, seed: int, *, compares: bool = False) -> Point:
    """The training of a method at a rate and with a seed."""
    name = f"{method}-r{_method(config, method).r}-b{config.train.batch_size}-{learning_rate:.3g}-s{seed}"
    return Point(name, method, learning_rate, seed, compares)


def swept_methods(config: RunConfig) -> list[str]:
    """The methods that the config sweeps, sorted by the format of their base, so that it is loaded rarely. Raises
    ConfigError: one of them has no legal config."""
    names = config.tune.methods or [config.method.name]
    methods: list[str] = sorted(dict.fromkeys(names), key=lambda name: METHODS[name].base)
    for method in methods:
        at_rate(config, method, prior_rate(config, method))
    return methods


def prior_rate(config: RunConfig, method: str) -> float:
    """The learning rate to search around: the config's; for another method, scaled by the methods' relative rates."""
    relative = METHODS[method].relative_rate / METHODS[config.method.name].relative_rate
    return float(f"{min(config.learning_rate * (1 if method == config.method.name else relative), 0.1):.3g}")


def at_rate(config: RunConfig, method: str, learning_rate: float) -> RunConfig:
    """The config of a run that trains a method at a learning rate. Raises ConfigError: it is no legal config."""
    train = config.train.model_copy(update={"learning_rate": learning_rate})
    changed = config.model_copy(update={"method": _method(config, method), "train": train})
    try:
        return config_file.loads(config_file.dumps(changed))
    except ConfigError as exc:
        raise ConfigError(f"sweeping {method}: {str(exc).removeprefix('config: ')}") from exc


def trial_config(config: RunConfig, point: Point, num_records: int) -> RunConfig:
    """The config of a point's training: like a run's, but on one worker, which holds the whole base.

    Neither the number of workers nor ZeRO-3 changes the optimizer steps.
    """
    run = at_rate(config, point.method, point.learning_rate)
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


def servable_as(config: RunConfig, name: str) -> ServableAs:
    """How a method's adapters can be served, as far as the method determines it."""
    method = _method(config, name)
    return serving(method.row, rank=method.r, target_modules=()).servable_as


def _method(config: RunConfig, name: str) -> MethodConfig:
    """The method by its name: the config's own as it is, another with its own default rank and axes."""
    own = config.method
    if name == own.name:
        return own
    shared = {"dropout": own.dropout, "target_modules": own.target_modules, "loftq_steps": own.loftq_steps}
    return MethodConfig.model_validate({"name": name, **shared})


HALF = 2
"""Number of places from one half decade to the next."""
PER_DECADE = 4
FIRST, WIDEST = 2 * HALF, 6 * HALF
"""The places of the first grid's ends, and of those that it widens to, one half decade after the other."""


@dataclass(frozen=True)
class Grid:
    """The learning rates of one method, on a grid of quarter decades: the rate at place q is center x 10^(q/4). First
    come half decades, and the grid widens while the best is at an end; then the quarter decades beside the best."""

    center: float
    rates: tuple[float, ...] = ()
    """The config's own rates, ascending: then no others are tried, and a place is an index; empty for a grid."""

    def rate(self, place: int) -> float:
        """The learning rate at a place; on a grid, rounded to three digits."""
        return self.rates[place] if self.rates else float(f"{self.center * 10 ** (place / PER_DECADE):.3g}")

    @property
    def places(self) -> range:
        return range(len(self.rates)) if self.rates else range(-WIDEST - 1, WIDEST + 2)

    def wanted(self, losses: Mapping[int, float]) -> list[int]:
        """The places to try next; none when the search is over. `losses` has every outcome so far, infinite for a rate
        at which a training diverged or none succeeded.
        """
        first = self.places if self.rates else range(-FIRST, FIRST + 1, HALF)
        if missing := [place for place in first if place not in losses and self.rate(place) < 1]:
            return missing
        if self.rates:
            return []
        best = best_place(losses)
        for end, step in ((min(losses), -HALF), (max(losses), HALF)):
            if best == end and abs(end) < WIDEST and self.rate(end + step) < 1:
                return [end + step]
        beside = [best - 1, best + 1] if best % HALF == 0 and math.isfinite(losses[best]) else []
        return [place for place in beside if place not in losses and min(losses) < place < max(losses)]


def best_place(losses: Mapping[int, float]) -> int:
    """The place with the lowest loss; among equals, and where every training diverged, the lowest rate."""
    return min(sorted(losses), key=losses.__getitem__)


class Plan:
    """The points to try, handed out one by one, and the trials that resulted from them."""

    def __init__(self, config: RunConfig, methods: Sequence[str], ended: Iterable[Trial] = ()) -> None:
        self._config = config
        rates = tuple(sorted(set(config.tune.learning_rates)))
        self._grids = {method: Grid(prior_rate(config, method), rates) for method in methods}
        self.compares = len(methods) > 1
        self._begun: set[str] = set()
        self.trials: dict[str, Trial] = {}
        for trial in ended:
            if trial.is_outcome:
                self.add(trial)

    def next(self) -> Point | Literal["wait", "done"]:
        """The next point to start; "wait" where that depends on running trials, "done" at the end."""
        for point in self._open():
            if point.name not in self._begun:
                self._begun.add(point.name)
                return point
        return "wait" if self._begun - self.trials.keys() else "done"

    def add(self, trial: Trial) -> None:
        self._begun.add(trial.name)
        self.trials[trial.name] = trial

    @property
    def num_to_come(self) -> int:
        """Number of trials that have not ended yet, as far as is known: a grid that widens or is refined adds more, and
        a method whose trainings all diverge is not compared."""
        searching = sum(len(self._searching(method)) for method in self._grids)
        compared = sum(trial.compares for trial in self.trials.values())
        return searching + (len(self._grids) * COMPARE_SEEDS - compared if self.compares else 0)

    def _open(self) -> Iterable[Point]:
        """All points that are wanted now and whose trials have not ended."""
        searching = {method: self._searching(method) for method in self._grids}
        for points in searching.values():
            yield from points
        for method in self._grids if self.compares else ():
            # Not where every training diverged.
            if not searching[method] and math.isfinite(min(self.losses(method).values(), default=math.inf)):
                yield from (point for point in self._compared(method) if point.name not in self.trials)

    def _searching(self, method: str) -> list[Point]:
        wanted = self._grids[method].wanted(self.losses(method))
        return [point for place in wanted for point in self._at(method, place) if point.name not in self.trials]

    def _at(self, method: str, place: int) -> list[Point]:
        config, rate = self._config, self._grids[method].rate(place)
        return [point_of(config, method, rate, config.train.seed + number) for number in range(config.tune.seeds)]

    def _compared(self, method: str) -> list[Point]:
        config, rate = self._config, self._grids[method].rate(best_place(self.losses(method)))
        first = config.train.seed + config.tune.seeds
        return [point_of(config, method, rate, first + number, compares=True) for number in range(COMPARE_SEEDS)]

    def losses(self, method: str) -> dict[int, float]:
        """The mean loss at each place whose trials have all ended; infinite where one diverged, or all failed."""
        means = {}
        for place in self._grids[method].places:
            trials = [self.trials[point.name] for point in self._at(method, place) if point.name in self.trials]
            if len(trials) == self._config.tune.seeds:
                losses = [math.inf if trial.loss is None else trial.loss for trial in trials if trial.is_outcome]
                means[place] = sum(losses) / len(losses) if losses else math.inf
        return means

    def seeds_of(self, method: str) -> list[Trial]:
        """The finished trials of the method in the comparison of methods, in the order of their seeds."""
        trials = [self.trials.get(point.name) for point in self._compared(method)]
        return [trial for trial in trials if trial is not None and trial.status == "finished"]

    def tuned(self, method: str, memory_bytes: int | None = None) -> Tuned | None:
        """The sweep's result for the method; None where no rate has a finite loss."""
        losses = self.losses(method)
        best = best_place(losses) if losses else 0
        if not math.isfinite(losses.get(best, math.inf)):
            return None
        rates = [self._rate_loss(method, place, losses[place]) for place in sorted(losses)]
        at = sorted(losses).index(best)
        below, above = rates[at - 1] if at else None, rates[at + 1] if at + 1 < len(rates) else None
        grid = self._grids[method]
        prior = next((loss for place, loss in losses.items() if grid.rate(place) == grid.center), math.inf)
        steps = [trial.step_s for point in self._at(method, best) if (trial := self.trials[point.name]).step_s]
        return Tuned(
            method=method,
            rank=_method(self._config, method).r,
            batch_size=self._config.train.batch_size,
            prior=grid.center,
            learning_rate=rates[at].learning_rate,
            loss=losses[best],
            below=below,
            above=above,
            is_inside=below is not None and above is not None,
            gain_over_prior=prior - losses[best] if math.isfinite(prior) else None,
            rates=rates,
            step_s=min(steps, default=None),
            memory_bytes=memory_bytes,
            forgotten=forgotten_by(self.seeds_of(method), self.trials.values()),
        )

    def _rate_loss(self, method: str, place: int, loss: float) -> RateLoss:
        trials = [self.trials[point.name] for point in self._at(method, place)]
        ends = None
        if all(len(trial.record_nll) > 1 for trial in trials):  # a single record has no variance
            ends = interval([trial.record_nll for trial in trials], trials[0].record_tokens)[1:]
        return RateLoss(
            learning_rate=self._grids[method].rate(place),
            loss=loss if math.isfinite(loss) else None,
            statuses=[trial.status for trial in trials],
            ci95=ends,
        )
