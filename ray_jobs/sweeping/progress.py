"""How far a sweep is, and how long it will still take."""

import time
from collections.abc import Callable

from components.records.sweep import Trial
from components.shared.durations import estimated_duration
from ray_jobs.sweeping.plan import Plan


class Progress:
    """Of a sweep that begins, or goes on, when this is made.

    Time is counted in trainings, from the first one's first step: as many as have ended since, whatever came of them,
    and of those that are under way the part that is behind them. What is to come will be as fast.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._num_before = len(plan.trials)
        self._began: float | None = None
        self._under_way: dict[str, float] = {}

    def line(self, trial: Trial) -> str:
        """A measurement of a trial that is under way, for a person."""
        now = self._clock()
        if self._began is None:
            self._began = now - ((trial.seconds or 0.0) - (trial.ready_s or 0.0))
        self._under_way[trial.name] = trial.steps / trial.num_steps
        ended, to_come = len(self._plan.trials), self._plan.num_to_come
        part = sum(share for name, share in self._under_way.items() if name not in self._plan.trials)
        left_s = (now - self._began) / (ended - self._num_before + part) * max(0.0, to_come - part)
        loss = f": loss {trial.loss:.4f}" if trial.loss is not None else ""
        return (
            f"{ended}/{ended + to_come} trials, about {estimated_duration(left_s)} left; "
            f"{trial.method} {trial.learning_rate:.3g} step {trial.steps}/{trial.num_steps}{loss}"
        )
