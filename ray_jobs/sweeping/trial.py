"""One trial in its worker, trained like a run's own training on a base that the process keeps, and what Ray Tune needs.
After a measurement at which Tune stops a trial, `ray.tune.report` ends the thread, and the training with it."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from components.config import config_file
from components.config.schema import RunConfig
from components.records.steps import Role
from components.records.sweep import Trial
from components.shared.errors import Diverged
from components.shared.protocol import estimated_duration
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import own_base
from ray_jobs.base import base_model
from ray_jobs.probes.texts import Texts
from ray_jobs.scoring.measure import BaseCache
from ray_jobs.sweeping.plan import Plan, Point, trial_config
from ray_jobs.sweeping.verdict import cause
from ray_jobs.text import token_store
from ray_jobs.text.answer_loss import records_nll
from ray_jobs.text.batching import TokenizedSplit, by_length
from ray_jobs.text.token_store import StoredTokens
from ray_jobs.training import opening, train_loop, zero
from ray_jobs.training.spec import TrainingConfig, TrainSpec
from ray_jobs.training.train_loop import Splits
from ray_jobs.training.worker import fit
from ray_jobs.training.zero import Worker


@dataclass
class Course:
    """The progress of a trial, as kept in its record."""

    trial: Trial
    began: float = field(default_factory=time.monotonic)
    free_since: float | None = None
    """When the previous trial in the same process ended, on the monotonic clock; None for the first."""
    ended_step: float | None = None
    step_seconds: list[float] = field(default_factory=list)

    def update(self, **changes: Any) -> None:
        self.trial = self.trial.model_copy(update=changes)

    def step(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self.ended_step is None:
            self.update(ready_s=round(now - self.began - record["elapsed_s"], 3), num_steps=record["num_steps"])
        else:
            self.step_seconds.append(now - self.ended_step)
        self.ended_step = now
        self.update(steps=record["step"])

    def measured(self, step: int, loss: float) -> None:
        """Record a measurement. Raises Diverged: the loss is NaN, or higher than the base's own."""
        start = self.trial.start_loss
        assert start is not None, "measured before the base was"
        self.ended_step = time.monotonic() if self.ended_step else None  # excludes the measurement from step times
        self.update(curve=[*self.trial.curve, (step, loss)], loss=loss)
        if not loss <= start:  # also true for NaN
            raise Diverged(f"after {step} steps the validation loss is {loss:.4g}, and {start:.4g} at its start")

    def record(self, **changes: Any) -> Trial:
        times = {"seconds": round(time.monotonic() - self.began, 3)}
        if self.free_since is not None:
            times["waited_s"] = round(self.began - self.free_since, 3)
        if self.step_seconds:
            times["step_s"] = round(statistics.median(self.step_seconds), 4)
        return self.trial.model_copy(update={**times, **changes})


_CACHE = BaseCache()
"""The base that this process holds from one trial to the next."""


def run_trial(
    tune_config: Mapping[str, Any],
    *,
    resolved: Mapping[str, Any],
    train_tokens: StoredTokens,
    validation_tokens: StoredTokens,
    passages: Texts,
) -> None:
    """The trainable for Ray Tune. `tune_config` holds the trial's config as TOML, and its record as far as it is known;
    `resolved` are the fields of its TrainSpec that the config does not have."""
    # Seconds that a stopped trial may take to release its resources, before its process is replaced.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    entry.quiet_libraries()
    spec = TrainSpec.of(config_file.loads(tune_config["config"]), **resolved)

    def report(trial: Trial) -> None:
        loss = math.inf if trial.loss is None or trial.status == "diverged" else trial.loss
        tune.report({"loss": loss, "step": trial.steps, "trial": trial.model_dump(mode="json")})

    course = Course(Trial.model_validate(tune_config["trial"]), free_since=_CACHE.free_since)
    store = Store.open(spec.registry)
    train_split, validation = (token_store.load(store, tokens) for tokens in (train_tokens, validation_tokens))
    try:
        trained = train_trial(spec, course, (train_split, validation), passages, _CACHE, report)
    finally:
        _CACHE.free_since = time.monotonic()
    report(trained)


def train_trial(
    spec: TrainSpec, course: Course, splits: Splits, passages: Texts, cache: BaseCache, report: Callable[[Trial], None]
) -> Trial:
    """Train to the end, or until the loss diverges; `report` receives the record at each measurement but the last.

    The passages of general text are read only if the trial compares methods.
    """
    worker, validation = _alone(spec), splits[1]
    num_tokens = validation.num_answer_tokens
    reads = course.trial.compares and len(passages.split) > 0

    def measure(model: Any, split: TokenizedSplit) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of each record's answer in nats, in batches as of the training's own measurements."""
        model.eval()
        sums = np.zeros(len(split))
        for indices in by_length(split.lengths, spec.train.micro_batch_size):
            with torch.no_grad():
                nll = records_nll(model, split, indices, spec.pad, device=worker.device).double().cpu().numpy()
            sums[indices] = [part.sum() for part in np.split(nll, np.cumsum(split.num_answer_tokens[indices])[:-1])]
        return sums

    def read(model: Any, role: Role, measured: list[float] | None = None) -> list[float]:
        """Record the losses on the passages, of the base before training or the candidate after it."""
        began = time.monotonic()
        nll = measured or measure(model, passages.split).round(5).tolist()
        text = course.trial.general_text or passages.losses.model_copy(update={"base_format": spec.method.row.base})
        seconds = (course.trial.general_s or 0.0) + time.monotonic() - began
        text = text.model_copy(update={"nll": {**text.nll, role: nll}})
        course.update(general_text=text, general_s=round(seconds, 3))
        return nll

    def load(*base: Any, **how: Any) -> Any:
        model = cache.load(*base, **how)
        if cache.start_loss is None:
            cache.start_loss = float(measure(model, validation).sum() / num_tokens.sum())
        if reads and not own_base.is_needed(spec.method):
            cache.general_nll = read(model, "base", cache.general_nll)
        course.update(start_loss=cache.start_loss, bases_loaded=cache.num_loaded)
        return model

    def hear(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            course.step(record)
            return
        course.measured(record["step"], record["loss"])
        if record["step"] < course.trial.num_steps:
            report(course.record())

    try:
        store = Store.open(spec.registry)
        opened = opening.open_base(spec, worker, store, splits[0])
        adapted = fit(spec, opened, store, splits, report=hear, load=load).adapted
    except Diverged as exc:
        return course.record(status="diverged", loss=None, why=str(exc))
    nll = measure(adapted, validation)
    if reads:
        read(adapted, "candidate")
    return course.record(
        status="finished",
        loss=float(nll.sum() / num_tokens.sum()),
        record_nll=nll.round(5).tolist(),
        record_tokens=num_tokens.tolist(),
    )


def make_base(config_toml: str) -> None:
    """Create the base that the method's trials read from the store, unless it is there."""
    config = config_file.loads(config_toml)
    if not config.ray.use_gpu:
        torch.set_num_threads(config.ray.cpus_per_worker)
    store = Store.open(config.registry)
    own_base.prepare(config, base_model.resolve(config.model, registry=store), store)


def _alone(config: TrainingConfig) -> Worker:
    """Set up this process as a process group of one, which the training code needs."""
    use_gpu = config.ray.use_gpu
    zero.prepare_environment(use_gpu=use_gpu)
    if not use_gpu:
        torch.set_num_threads(config.ray.cpus_per_worker)
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("nccl" if use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Worker(0, 1, torch.device("cuda", 0) if use_gpu else torch.device("cpu"))


class PlanSearcher(Searcher):
    """A Tune searcher that suggests the points of a plan."""

    def __init__(self, plan: Plan, as_config: Callable[[Point], dict[str, Any]]) -> None:
        super().__init__(metric="loss", mode="min")
        self._plan, self._as_config = plan, as_config

    def __getstate__(self) -> dict[str, Any]:
        """Return no state for Tune to save: a sweep resumes from the trials in the store."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        match self._plan.next():
            case "wait":
                return None
            case "done":
                return str(Searcher.FINISHED)
            case point:
                return self._as_config(point)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing, as in the others: `Ledger` records trials, before Tune asks for the next."""

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class Ledger(tune.Callback):
    """Adds every trial that has ended to the plan, and passes it to `keep`. `report` gets a line at each measurement
    of a running one, with the time left.

    The rate is trainings per second since the first one's first step: those that have ended since, whatever their
    outcome, plus the completed part of those that are running. The remaining trainings are assumed to be as fast.
    """

    def __init__(
        self,
        plan: Plan,
        keep: Callable[[Trial], None],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._keep, self._report, self._clock = plan, keep, report, clock
        self._num_before = len(plan.trials)
        self._began: float | None = None
        self._under_way: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:
        if (record := _record(result["trial"])).status == "running":
            self._report(self.line(record))

    def line(self, trial: Trial) -> str:
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

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Record a trial that ended by itself or that the scheduler stopped."""
        record = _record(trial.last_result["trial"])
        self._add(record, {"status": "stopped"} if record.status == "running" else {})

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        why = cause(Path(trial.error_file).read_text(encoding="utf-8"))
        record = _record((trial.last_result or {}).get("trial") or trial.config["trial"])
        self._add(record, {"status": "failed", "loss": None, "why": why})

    def _add(self, record: Trial, changes: Mapping[str, Any]) -> None:
        record = record.model_copy(update=changes)
        self._plan.add(record)
        self._keep(record)


class StopsWorseHalf(FIFOScheduler):
    """Stops a trial halfway that is then worse than the median of its method's before it (asynchronous halving,
    arXiv:1810.05934).

    Methods learn at different paces; within one, the order of the learning rates is what matters. Before halfway a low
    rate has not had time to learn. Trials that compare methods all run to their end.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self._halfway = max(1, num_steps // 2)
        self._losses: dict[str, dict[str, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        record = trial.config["trial"]
        losses = self._losses.setdefault(record["method"], {})
        if record["compares"] or record["name"] in losses or result["step"] < self._halfway:
            return TrialScheduler.CONTINUE
        is_worse = bool(losses) and result["loss"] > statistics.median(losses.values())
        losses[record["name"]] = result["loss"]
        return TrialScheduler.STOP if is_worse else TrialScheduler.CONTINUE


def run(
    trainable: Any,
    plan: Plan,
    as_config: Callable[[Point], dict[str, Any]],
    ledger: Ledger,
    *,
    num_steps: int,
    storage_path: str,
) -> None:
    """Run all trials of the plan, as many at once as the cluster has room for; a failed trial does not stop others."""

    def name(trial: Any) -> str:
        return str(trial.config["trial"]["name"])

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the ledger records trials
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=PlanSearcher(plan, as_config),
            scheduler=StopsWorseHalf(num_steps),
            num_samples=-1,  # unlimited: the plan ends the search
            reuse_actors=True,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(name="ray", storage_path=storage_path, callbacks=[ledger], verbose=0),
    ).fit()


def as_config(config: RunConfig, point: Point, num_records: int) -> dict[str, Any]:
    """A trial's Tune config: its own config, and its initial record."""
    whole = trial_config(config, point, num_records)
    record = Trial(
        name=point.name,
        config_digest=whole.digest,
        method=point.method,
        learning_rate=point.learning_rate,
        rank=whole.method.r,
        batch_size=whole.train.batch_size,
        seed=point.seed,
        compares=point.compares,
        status="running",
        num_steps=train_loop.num_steps(whole.train, num_records),
    )
    return {"config": config_file.dumps(whole), "trial": record.model_dump(mode="json")}


def _record(values: Mapping[str, Any]) -> Trial:
    return Trial.model_validate_json(json.dumps(values))
