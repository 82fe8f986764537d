"""The recorded metrics of a training, step by step, and the progress line for a person.

A thread uploads them, so a slow or unavailable store delays no step: each upload contains everything before it.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from components.records import runs
from components.shared.errors import IntegrityError, ObjectMissing, StoreError
from components.shared.protocol import counted, say
from components.store.store import JSON, Store, encode_json
from ray_jobs.training.patience import patiently
from ray_jobs.training.trackers import Trackers

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
        self._store = store
        self._trackers = trackers
        self._patience_s = patience_s
        self._key = runs.run_key(run_id, runs.METRICS)
        self._checkpoint_every = checkpoint_every_steps
        found = store.read(self._key)
        self._restarts_key = runs.run_key(run_id, runs.RESTARTS)
        self.restarts, self.steps_repeated = _restarts(store, self._restarts_key) if found else (0, 0)
        # After a restart the metrics continue; points after the checkpoint are replaced as their steps are repeated.
        self._points = [_point(json.loads(line)) for line in found[0].splitlines()] if found else []
        self._taken = max((point.step for point in self._points if point.kind == "train"), default=0)
        """Last step of the lost worker group; 0 without a restart, and once this group has taken a step."""
        self._every = 1
        self._said_at = 0.0
        self._uploaded_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._uploading: Future[None] | None = None
        self._is_refused = False

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the record of a step or a held-out evaluation."""
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
        if is_checkpoint or now - self._uploaded_at >= METRICS_EVERY_S:
            self._upload_beside()

    def upload(self) -> None:
        """Upload the whole file, and wait until it is stored.

        Raises:
            StoreError: the store is unavailable, or refuses it.
        """
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

    def _upload_beside(self) -> None:
        """Upload the whole file in the background, since objects in the store cannot be appended to."""
        if self._uploading is not None and not self._uploading.done():
            return  # the next upload includes these points
        self._uploaded_at = time.monotonic()
        self._uploading = self._thread.submit(self._try, self._body())

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


def _restarts(store: Store, key: str) -> tuple[int, int]:
    """Restarts and repeated steps as earlier workers counted them; zeros where that cannot be read."""
    try:
        found = store.get_json(key)
        return int(found["restarts"]), int(found["steps_repeated"])
    except (ObjectMissing, IntegrityError, LookupError, TypeError, ValueError):
        return 0, 0


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
