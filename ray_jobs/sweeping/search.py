"""Ray Tune integration of a sweep: choosing the next trial, stopping trials early, and recording those that ended."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from components.config import config_file
from components.config.schema import RunConfig
from components.config.tune import Scheduler
from components.records.sweep import Trial
from ray_jobs.sweeping import points
from ray_jobs.sweeping.plan import Plan
from ray_jobs.sweeping.points import Point
from ray_jobs.sweeping.trial_rows import cause
from ray_jobs.training import train_loop

logger = logging.getLogger(__name__)

KEEP_HALF = 2


class PlanSearcher(Searcher):
    """A Tune searcher that suggests the points of a plan."""

    def __init__(self, plan: Plan, as_config: Callable[[Point], dict[str, Any]]) -> None:
        super().__init__(metric="loss", mode="min")
        self._plan, self._as_config = plan, as_config

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune to save: a sweep resumes from the trials in the store."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None if there is none at present."""
        match self._plan.next():
            case "wait":
                return None
            case "done":
                return str(Searcher.FINISHED)
            case point:
                return self._as_config(point)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `Ledger` records trials, before Tune asks for the next."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, as there is no state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as there is no state."""


class Ledger(tune.Callback):
    """Adds every trial that has ended to the plan, and passes it to `keep`.

    `report` receives each measurement of a running trial.
    """

    def __init__(self, plan: Plan, keep: Callable[[Trial], None], report: Callable[[Trial], None]) -> None:
        self._plan, self._keep, self._report = plan, keep, report

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune to save, as in `PlanSearcher`."""
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:
        """Report a measurement of a running trial."""
        if (record := _record(result["trial"])).status == "running":
            self._report(record)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record a trial that ended by itself or that the scheduler stopped."""
        record = _record(trial.last_result["trial"])
        self._add(record.model_copy(update={"status": "stopped"}) if record.status == "running" else record)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record a trial that failed; the sweep continues without it."""
        known = (trial.last_result or {}).get("trial") or trial.config["trial"]
        self._add(
            _record(known).model_copy(
                update={
                    "status": "failed",
                    "loss": None,
                    "why": cause(Path(trial.error_file).read_text(encoding="utf-8")),
                }
            )
        )

    def _add(self, record: Trial) -> None:
        self._plan.add(record)
        self._keep(record)


class SchedulerPerArm(FIFOScheduler):
    """Stops trials early, comparing each only with those of the same method, rank and batch size.

    Methods learn at different paces; within one, the order of the learning rates is what matters. Trials that compare
    methods all run to their end.
    """

    def __init__(self, make: Callable[[], TrialScheduler]) -> None:
        super().__init__()
        self._make = make
        self._schedulers: dict[str, TrialScheduler] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune to save, as in `PlanSearcher`."""
        return {}

    def _of(self, trial: Any) -> TrialScheduler | None:
        if trial.config["trial"]["compares"]:
            return None
        arm = trial.config["arm"]
        if arm not in self._schedulers:
            self._schedulers[arm] = self._make()
        return self._schedulers[arm]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tell the arm's scheduler that a trial is queued."""
        if scheduler := self._of(trial):
            scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether the trial continues."""
        scheduler = self._of(trial)
        return scheduler.on_trial_result(tune_controller, trial, result) if scheduler else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tell the arm's scheduler that a trial has ended by itself."""
        if scheduler := self._of(trial):
            scheduler.on_trial_complete(tune_controller, trial, result)


def run(
    trainable: Any,
    plan: Plan,
    as_config: Callable[[Point], dict[str, Any]],
    scheduler: TrialScheduler,
    ledger: Ledger,
    *,
    storage_path: str,
) -> None:
    """Run all trials of the plan, as many at once as the cluster has room for; a failed trial does not stop others."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the ledger records trials
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=PlanSearcher(plan, as_config),
            scheduler=scheduler,
            num_samples=-1,  # unlimited: the plan ends the search
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(name="ray", storage_path=storage_path, callbacks=[ledger], verbose=0),
    ).fit()


def _name(trial: Any) -> str:
    name: str = trial.config["trial"]["name"]
    return name


def scheduler(kind: Scheduler, num_steps: int) -> TrialScheduler:
    """The config's scheduler. It stops trials only from halfway on: before, a low rate has not had time to learn."""
    halfway = max(1, num_steps // 2)
    match kind:
        case "none":
            return FIFOScheduler()
        case "asha":
            return SchedulerPerArm(
                lambda: AsyncHyperBandScheduler(
                    time_attr="step",
                    metric="loss",
                    mode="min",
                    grace_period=halfway,
                    max_t=max(num_steps, halfway + 1),
                    reduction_factor=KEEP_HALF,
                )
            )
        case "median":
            return SchedulerPerArm(
                lambda: MedianStoppingRule(time_attr="step", metric="loss", mode="min", grace_period=halfway)
            )


def as_config(config: RunConfig, point: Point, num_records: int) -> dict[str, Any]:
    """A trial's Tune config: its own config, and its initial record."""
    whole = points.trial_config(config, point, num_records)
    record = Trial(
        name=point.name,
        config_digest=whole.digest,
        method=point.arm.method,
        learning_rate=point.learning_rate,
        rank=point.arm.rank,
        batch_size=point.arm.batch_size,
        seed=point.seed,
        compares=point.compares,
        status="running",
        num_steps=train_loop.num_steps(whole.train, num_records),
    )
    arm = "-".join(str(each) for each in asdict(point.arm).values())
    return {"config": config_file.dumps(whole), "arm": arm, "trial": record.model_dump(mode="json")}


def _record(values: Mapping[str, Any]) -> Trial:
    return Trial.model_validate_json(json.dumps(values))
