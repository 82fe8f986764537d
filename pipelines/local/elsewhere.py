"""The display of a run that executes elsewhere, from what it writes to the store meanwhile.

Every run, however it was started, writes each step's record when the step ends, and its training curve every 15 s.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from components.records import runs
from components.records.steps import Decision, Evaluation
from components.report.report import parse_metrics
from components.shared.errors import StoreError
from components.shared.protocol import Line

if TYPE_CHECKING:
    from components.records.steps import StepRecord
    from components.store.store import Store
    from pipelines.local.display import Display

EVERY_S = 5.0
QUIET_S = 180.0
TRAINING = "finetune"
LAST = "report"
"""The last step of each run in a pipeline, failed runs included."""


class Elsewhere:
    """A run that executes elsewhere, and what of it has been shown so far."""

    def __init__(self, store: "Store", run_id: str, display: "Display") -> None:
        self._store, self._run_id, self._display = store, run_id, display
        self._shown: set[str] = set()
        self._is_training = False
        self.failed: StepRecord | None = None

    def look(self) -> bool:
        """Show what is new, and return whether the run is over; a store that does not answer is asked again later."""
        try:
            steps = runs.steps(self._store, self._run_id)
            if not any(step.step == TRAINING for step in steps):
                self._show_curve()
            for step in steps:
                self._show(step)
            if self.failed or LAST in self._shown:
                return True
            # A run that only trains ends with its evaluation; with a gate, its pod may take a while to start.
            return runs.find(self._store, self._run_id, Evaluation) is not None and self._rests()
        except StoreError as exc:
            self._display.message(f"the store does not answer, and is asked again: {exc}")
            return False

    def decision(self) -> Decision | None:
        """Return the gate's decision; None if the run did not get that far."""
        return runs.find(self._store, self._run_id, Decision, to_show=True)

    def _rests(self) -> bool:
        newest = max(item.last_modified for item in self._store.list(runs.run_key(self._run_id)))
        return (datetime.now(UTC) - newest).total_seconds() > QUIET_S

    def _show(self, step: "StepRecord") -> None:
        if step.step in self._shown:
            return
        self._shown.add(step.step)
        if not (step.step == TRAINING and self._is_training):
            self._display.start(step.step)
        if step.succeeded:
            self._display.finish(step.seconds)
        elif self.failed is None:
            self.failed = step
            self._display.fail()

    def _show_curve(self) -> None:
        key = runs.run_key(self._run_id, runs.METRICS)
        found = self._store.read(key)
        records = parse_metrics(found[0].decode(), origin=key) if found else []
        if not records:
            return
        if not self._is_training:
            self._is_training = True
            self._display.start(TRAINING)
        steps = [record for record in records if record["kind"] == "train"]
        measured = [record for record in records if record["kind"] == "eval" and record["loss"] is not None]
        said = []
        if steps:
            said.append(f"step {steps[-1]['step']}/{steps[-1]['num_steps']}  loss {steps[-1]['loss']:.3f}")
        if measured:
            said.append(f"held-out {measured[-1]['loss']:.4f} at step {measured[-1]['step']}")
        self._display.line(Line(TRAINING, "  ".join(said)))


def follow(run: Elsewhere, tick: Callable[[], None], *, every_s: float = EVERY_S) -> None:
    """Show the run until it is over."""
    while not run.look():
        until = time.monotonic() + every_s
        while time.monotonic() < until:
            tick()
            time.sleep(min(0.25, every_s))
