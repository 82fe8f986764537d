"""Sending a training's metrics to MLflow, Weights & Biases and trackio while it runs, as far as the config names them.

A thread sends them from a bounded queue: no step waits for a tracker, and a slow or unavailable one only loses points.
"""

import contextlib
import importlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from components.config import config_file
from components.config.schema import TRACKED_RUNS, TRACKER_SECRETS_FILE, RunConfig
from components.records.steps import scalars
from components.shared.machine import in_environment

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
LAST_S = 30.0
"""Seconds that the end of a training waits for points that have not been sent yet."""
Point = tuple[int, dict[str, float]]


class Tracker(Protocol):
    """One run at one tracker, as the runs of wandb and trackio are."""

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Add the values of a step."""

    def finish(self) -> None:
        """End the run, after waiting for what has not been sent yet."""


class Mlflow:
    """A run in an MLflow experiment; a resumed training continues its run (mlflow.MlflowClient of 2.x and 3.x).

    mlflow.start_run would send the user's name, the program and its commit along.
    """

    def __init__(self, target: str, config: RunConfig, run_id: str) -> None:
        mlflow, entities = importlib.import_module("mlflow"), importlib.import_module("mlflow.entities")
        self._client, self._metric = mlflow.MlflowClient(tracking_uri=target), entities.Metric
        name = config.adapter.name
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        runs = self._client.search_runs([where], filter_string=f"tags.`fineloop.run_id` = '{run_id}'")
        run = runs[0] if runs else self._client.create_run(where, run_name=run_id, tags={"fineloop.run_id": run_id})
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        about = {"method": config.method.name, "base": config.model.base, "learning_rate": config.learning_rate}
        for key, value in about.items():
            self._client.log_param(self._run_id, key, value)

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Send the values of a step in one request."""
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(key, value, now_ms, step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self) -> None:
        """End the run, however the training ended: the outcome is in its version."""
        self._client.set_terminated(self._run_id)


def _wandb(target: str, config: RunConfig, run_id: str) -> Tracker:
    """A run with our id (wandb.init). By default it would send console, command line, code and machine as well."""
    wandb = importlib.import_module("wandb")
    entity, _, project = target.rpartition("/")
    off = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    settings = wandb.Settings(console="off", x_save_requirements=False, **dict.fromkeys(off, True))
    about = {"config": _about(config), "id": run_id, "name": run_id, "resume": "allow"}
    run: Tracker = wandb.init(entity=entity or None, project=project, settings=settings, **about)
    return run


def _trackio(target: str, config: RunConfig, run_id: str) -> Tracker:
    """A run with our id as its name (trackio.init)."""
    trackio = importlib.import_module("trackio")
    run: Tracker = trackio.init(project=target, name=run_id, resume="allow", config=_about(config), embed=False)
    return run


def _about(config: RunConfig) -> dict[str, Any]:
    """What a curve depends on, without the sections that hold addresses of data, stores and servers."""
    table = config_file.as_table(config)
    return {section: table[section] for section in ("adapter", "model", "method", "train")}


# accelerate.tracking has these and more, but logs through a PartialState, which sets a worker's number of threads and
# its process group anew.
TRACKERS: Mapping[str, Callable[[str, RunConfig, str], Tracker]] = {
    "mlflow": Mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}


def secrets(config: RunConfig, run_id: str) -> dict[str, str]:
    """What the trackers log in with, where `fineloop run` keeps it in a file; elsewhere the environment has it."""
    if config.track.secrets and (folder := os.environ.get(TRACKED_RUNS)):
        with contextlib.suppress(FileNotFoundError):  # it was started without any
            return dict(json.loads((Path(folder) / run_id / TRACKER_SECRETS_FILE).read_text(encoding="utf-8")))
    return {}


class Trackers:
    """The trackers that the config names, for one training."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        self._named = {name: target for name in TRACKERS if (target := getattr(config.track, name))}
        self._config, self._run_id = config, run_id
        self._waiting: queue.Queue[Point | None] = queue.Queue(MOST_WAITING)
        self._lost = 0
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._send, name="trackers", daemon=True)
        if self._named:
            self._thread.start()

    def add(self, record: Mapping[str, Any]) -> None:
        """Queue the record of a step or a held-out evaluation, and return at once."""
        if self._named:
            self._put((int(record["step"]), scalars(record)))

    def close(self) -> None:
        """Wait up to LAST_S for the points that are still queued."""
        if not self._named:
            return
        self._put(None)
        self._thread.join(LAST_S)
        if self._thread.is_alive() or self._lost:
            logger.warning("%s lacks points of this training: metrics.jsonl has all of them", ", ".join(self._named))

    def _put(self, point: Point | None) -> None:
        try:
            self._waiting.put_nowait(point)
        except queue.Full:
            self._lost += 1

    def _send(self) -> None:
        with in_environment(secrets(self._config, self._run_id)):
            begun = {
                name: self._tried(name, partial(TRACKERS[name], target, self._config, self._run_id))
                for name, target in self._named.items()
            }
            trackers = {name: tracker for name, tracker in begun.items() if tracker is not None}
            while (point := self._waiting.get()) is not None:
                for name, tracker in trackers.items():
                    step, values = point
                    self._tried(name, partial(tracker.log, values, step=step))
            for name, tracker in trackers.items():
                self._tried(name, tracker.finish)

    def _tried(self, name: str, call: Callable[[], Any]) -> Any:
        """Call a tracker; if it fails, return None and log a warning the first time."""
        try:
            return call()
        except ModuleNotFoundError:
            logger.warning("track.%s is set, and %s is not installed beside the workers: pip install %s", *[name] * 3)
        except Exception as exc:  # each package has its own exceptions, and none may end a training
            if name not in self._warned:
                logger.warning("the training goes on without %s: %s: %s", name, type(exc).__name__, exc)
            self._warned.add(name)
        return None
