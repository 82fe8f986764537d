"""The curve of a training as it is recorded, and the line of it that a person watches."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from components.records import runs
from components.shared.counted import counted
from components.shared.protocol import say
from components.store.store import Store

PROGRESS_EVERY_S = 1.0
METRICS_EVERY_S = 15.0


class MetricsLog:
    """runs/<run_id>/metrics.jsonl, and the line that a person watches."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._key = runs.run_key(run_id, runs.METRICS)
        found = store.read(self._key)
        # After a restart the curve goes on; records beyond the checkpoint are replaced as their steps come again.
        self._records: list[dict[str, Any]] = [json.loads(line) for line in found[0].splitlines()] if found else []
        self._said_at = 0.0
        self._uploaded_at = time.monotonic()

    def add(self, record: Mapping[str, Any]) -> None:
        """Record a step or a measurement."""
        step, kind = record["step"], record["kind"]
        later = []  # what a restart comes to again
        while self._records and self._records[-1]["step"] >= step:
            later.append(self._records.pop())
        self._records += [r for r in reversed(later) if r["step"] == step and r["kind"] != kind]
        self._records.append(dict(record))
        now = time.monotonic()
        if record["kind"] == "eval":
            on = counted(record["records"], "record")
            say("finetune", f"step {step}: held-out loss {record['loss']:.4f} on {on}")
        elif now - self._said_at >= PROGRESS_EVERY_S or step == record["num_steps"]:
            self._said_at = now
            say("finetune", progress_line(record))
        if now - self._uploaded_at >= METRICS_EVERY_S:
            self.upload()

    def upload(self) -> None:
        """Write the whole file: objects cannot be appended to."""
        body = "".join(json.dumps(record) + "\n" for record in self._records)
        self._store.put(self._key, body.encode(), content_type="application/x-ndjson")
        self._uploaded_at = time.monotonic()


def progress_line(record: Mapping[str, Any]) -> str:
    """One step for a person: where, how good, how fast, how long still."""
    step, total = record["step"], record["num_steps"]
    left_s = record["elapsed_s"] / step * (total - step)
    minutes, seconds = divmod(math.ceil(left_s), 60)
    return (
        f"step {step}/{total}  loss {record['loss']:.3f}  lr {record['learning_rate']:.1e}  "
        f"{record['tokens_per_s']:.0f} tokens/s  {minutes}:{seconds:02d} left"
    )
