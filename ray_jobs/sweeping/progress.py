"""The progress of a sweep, and its estimated remaining time."""

import time
from collections.abc import Callable

from components.records.sweep import Trial
from components.shared.durations import estimated_duration
from ray_jobs.sweeping.plan import Plan


class Progress:
    """Progress of a sweep that starts, or resumes, when this is created.

    The rate is trainings per second since the first one's first step: those that have ended since, whatever their
    outcome, plus the completed part of those that are running. The remaining trainings are assumed to be as fast.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._num_before = len(plan.trials)
        self._began: float | None = None
        self._under_way: dict[str, float] = {}

    def line(self, trial: Trial) -> str:
        """One line of text about a measurement of a running trial."""
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
