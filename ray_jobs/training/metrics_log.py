"""The metrics of a training: recorded step by step, sent to trackers, and as a progress line for a person.

Threads send them, so that a slow or unavailable store or tracker delays no step.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from components.records import runs
from components.records.steps import scalars
from components.shared.errors import IntegrityError, ObjectMissing, StoreError
from components.shared.machine import in_environment
from components.shared.protocol import counted, say
from components.store.store import JSON, Store, encode_json
from ray_jobs.training.checkpoint import patiently
from ray_jobs.training.spec import TRACKED_RUNS, TRACKER_SECRETS_FILE, TrainSpec

MOST_WAITING = 10_000
"""Points that wait for a tracker; further ones are lost to it."""
LAST_S = 30.0
"""Seconds that the end of a training waits for points that have not been sent yet."""


class Mlflow:
    """A run in an MLflow experiment; a resumed training continues its run (mlflow.MlflowClient of 2.x and 3.x).

    mlflow.start_run would send the user's name, the program and its commit along.
    """

    def __init__(self, target: str, spec: TrainSpec) -> None:
        mlflow, entities = importlib.import_module("mlflow"), importlib.import_module("mlflow.entities")
        self._client, self._metric = mlflow.MlflowClient(tracking_uri=target), entities.Metric
        name = spec.adapter.name
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        runs = self._client.search_runs([where], filter_string=f"tags.`fineloop.run_id` = '{spec.run_id}'")
        tags = {"fineloop.run_id": spec.run_id}
        run = runs[0] if runs else self._client.create_run(where, run_name=spec.run_id, tags=tags)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        about = {"method": spec.method.name, "base": spec.model.base, "learning_rate": spec.learning_rate}
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


def _wandb(target: str, spec: TrainSpec) -> Any:
    """A run with our id (wandb.init). By default it would send console, command line, code and machine as well."""
    wandb = importlib.import_module("wandb")
    entity, _, project = target.rpartition("/")
    off = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    settings = wandb.Settings(console="off", x_save_requirements=False, **dict.fromkeys(off, True))
    about = {"config": _about(spec), "id": spec.run_id, "name": spec.run_id, "resume": "allow"}
    return wandb.init(entity=entity or None, project=project, settings=settings, **about)


def _trackio(target: str, spec: TrainSpec) -> Any:
    """A run with our id as its name (trackio.init)."""
    trackio = importlib.import_module("trackio")
    return trackio.init(project=target, name=spec.run_id, resume="allow", config=_about(spec), embed=False)


class TensorBoard:
    """Event files in the folder of a run on this machine (tensorboardX.SummaryWriter)."""

    def __init__(self, target: str, spec: TrainSpec) -> None:
        with warnings.catch_warnings():
            # It imports Google's storage client if it is installed, and that lacks a package of its.
            warnings.simplefilter("ignore", ImportWarning)
            self._writer = importlib.import_module("tensorboardX").SummaryWriter(target)

    def log(self, values: dict[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _about(spec: TrainSpec) -> dict[str, Any]:
    """What a curve depends on, without the sections that hold addresses of data, stores and servers."""
    sections = {"adapter": spec.adapter, "model": spec.model, "method": spec.method, "train": spec.train}
    return {name: section.model_dump(mode="json", exclude_none=True) for name, section in sections.items()}


# accelerate.tracking has these and more, but logs through a PartialState, which sets a worker's number of threads and
# its process group anew.
TRACKERS: Mapping[str, Callable[[str, TrainSpec], Any]] = {
    "mlflow": Mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
    "tensorboard": TensorBoard,
}


def secrets(spec: TrainSpec) -> dict[str, str]:
    """What the trackers log in with, where `fineloop run` keeps it in a file; elsewhere the environment has it."""
    if spec.track.secrets and (folder := os.environ.get(TRACKED_RUNS)):
        with contextlib.suppress(FileNotFoundError):  # it was started without any
            return dict(json.loads((Path(folder) / spec.run_id / TRACKER_SECRETS_FILE).read_text(encoding="utf-8")))
    return {}


class Trackers:
    """The trackers that the config names, and the event files of a run on this machine, for one training."""

    def __init__(self, spec: TrainSpec) -> None:
        self._named = {name: target for name in TRACKERS if (target := getattr(spec.track, name, ""))}
        if (folder := os.environ.get(TRACKED_RUNS)) and importlib.util.find_spec("tensorboardX"):
            self._named["tensorboard"] = str(Path(folder) / spec.run_id / "tensorboard")
        self._spec = spec
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._lost = 0
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._send, name="trackers", daemon=True)
        if self._named:
            self._thread.start()

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Queue the record of a step or a held-out evaluation, or None for the end, and return at once."""
        if self._named:
            try:
                self._waiting.put_nowait((int(record["step"]), scalars(record)) if record else None)
            except queue.Full:
                self._lost += 1

    def close(self) -> None:
        """Wait up to LAST_S for the points that are still queued."""
        if not self._named:
            return
        self.add(None)
        self._thread.join(LAST_S)
        if self._thread.is_alive() or self._lost:
            logger.warning("%s lacks points of this training: metrics.jsonl has all of them", ", ".join(self._named))

    def _send(self) -> None:
        with in_environment(secrets(self._spec)):
            begun = {
                name: self._tried(name, partial(TRACKERS[name], target, self._spec))
                for name, target in self._named.items()
            }
            trackers = {name: tracker for name, tracker in begun.items() if tracker is not None}
            while (point := self._waiting.get()) is not None:
                for name, tracker in trackers.items():
                    self._tried(name, partial(tracker.log, point[1], step=point[0]))
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


logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
METRICS_EVERY_S = 15.0
NDJSON = "application/x-ndjson"
MOST_POINTS = 10_000
"""Maximum number of points in the file, about 2.5 MB: beyond it only every second step is kept, then every fourth, and
so on."""


class _Point(NamedTuple):
    kind: str
    step: int
    line: str


class MetricsLog:
    """Writes runs/<run_id>/metrics.jsonl, and prints the progress line.

    It uploads every `checkpoint_every_steps`, so that a training that resumes from there has the metrics up to it; 0
    means no checkpoints. As a context manager it uploads at the end, also after a failure or the loss of a node; at the
    end it waits up to `patience_s` for an unavailable store.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        checkpoint_every_steps: int = 0,
        patience_s: float = 0,
        trackers: Trackers | None = None,
    ) -> None:
        self._store, self._trackers, self._patience_s = store, trackers, patience_s
        self._checkpoint_every = checkpoint_every_steps
        self._key, self._restarts_key = (runs.run_key(run_id, name) for name in (runs.METRICS, runs.RESTARTS))
        self.restarts = self.steps_repeated = 0
        self._points: list[_Point] = []
        if stored := store.read(self._key):
            # After a restart the metrics continue; points after the checkpoint are replaced as steps are repeated.
            self._points = [_point(json.loads(line)) for line in stored[0].splitlines()]
            with contextlib.suppress(ObjectMissing, IntegrityError, LookupError, TypeError, ValueError):
                counts = store.get_json(self._restarts_key)
                self.restarts, self.steps_repeated = int(counts["restarts"]), int(counts["steps_repeated"])
        self._taken = max((point.step for point in self._points if point.kind == "train"), default=0)
        """Last step of the lost worker group; 0 without a restart, and once this group has taken a step."""
        self._every = 1
        self._said_at = 0.0
        self._uploaded_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._uploading: Future[None] | None = None
        self._is_refused = False

    def add(self, record: Mapping[str, Any]) -> None:
        step, kind = record["step"], record["kind"]
        if self._trackers is not None:
            self._trackers.add(record)
        if self._taken and kind == "train":
            self.restarts, self.steps_repeated = self.restarts + 1, self.steps_repeated + max(0, self._taken - step + 1)
            self._taken = 0
            counted_so_far = encode_json({"restarts": self.restarts, "steps_repeated": self.steps_repeated})
            self._thread.submit(self._try, counted_so_far, self._restarts_key, JSON)
        later = []  # points that a restart repeats
        while self._points and self._points[-1].step >= step:
            later.append(self._points.pop())
        self._points += [point for point in reversed(later) if point.step == step and point.kind != kind]
        if kind == "train" and self._points and not self._is_kept(self._points[-1]):
            self._points.pop()  # the newest step is always kept until the next one
        self._points.append(_point(record))
        if len(self._points) > MOST_POINTS:
            self._every *= 2
            self._points = [*filter(self._is_kept, self._points[:-1]), self._points[-1]]
        now = time.monotonic()
        if kind == "eval":
            on = counted(record["records"], "record")
            say("finetune", f"step {step}: held-out loss {record['loss']:.4f} on {on}")
        elif now - self._said_at >= PROGRESS_EVERY_S or step == record["num_steps"]:
            self._said_at = now
            say("finetune", progress_line(record))
        is_checkpoint = kind == "train" and self._checkpoint_every and step % self._checkpoint_every == 0
        is_uploading = self._uploading is not None and not self._uploading.done()  # the next one includes these points
        if (is_checkpoint or now - self._uploaded_at >= METRICS_EVERY_S) and not is_uploading:
            self._uploaded_at = now
            self._uploading = self._thread.submit(self._try, self._body())

    def upload(self) -> None:
        """Upload the whole file, and wait until it is stored. Raises StoreError: the store is unavailable, or refuses
        it."""
        self._thread.shutdown()
        body = self._body()
        patiently(
            self._patience_s,
            lambda: self._store.put(self._key, body, content_type=NDJSON),
            "waiting to upload the curve",
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._trackers is not None:
            self._trackers.close()
        if error is None:
            self.upload()
        elif not isinstance(error, StoreError):  # after a StoreError an upload would fail too
            self._thread.shutdown()
            self._try(self._body())

    def _try(self, body: bytes, key: str = "", content_type: str = NDJSON) -> None:
        try:
            self._store.put(key or self._key, body, content_type=content_type)
        except StoreError as exc:
            if not self._is_refused:
                logger.warning("the training goes on, and its curve is uploaded later: %s", exc)
            self._is_refused = True
        else:
            self._is_refused = False

    def _body(self) -> bytes:
        return "".join(point.line for point in self._points).encode()

    def _is_kept(self, point: _Point) -> bool:
        return point.kind != "train" or point.step % self._every == 0


def _point(record: Mapping[str, Any]) -> _Point:
    # JSON has no infinity: in float16 it is the gradient norm of a step that is skipped.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return _Point(record["kind"], record["step"], json.dumps(finite, allow_nan=False) + "\n")


def progress_line(record: Mapping[str, Any]) -> str:
    """The progress line of one step: step, loss, learning rate, tokens per second and remaining time."""
    step, total = record["step"], record["num_steps"]
    left_s = record["elapsed_s"] / step * (total - step)
    minutes, seconds = divmod(math.ceil(left_s), 60)
    return (
        f"step {step}/{total}  loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}  "
        f"{record['tokens_per_s']:.0f} tokens/s  {minutes}:{seconds:02d} left"
    )
