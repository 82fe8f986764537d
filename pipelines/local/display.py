"""Terminal display of a run: one line per step; the running step's line is rewritten in place on a terminal."""

import os
import re
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from components.records import runs
from components.records.steps import Evaluation
from components.shared.errors import StoreError
from components.shared.protocol import STARTED, Line

if TYPE_CHECKING:
    from components.records.steps import StepRecord
    from components.store.store import Store


PLAIN_EVERY_S = 5.0  # seconds between lines of progress without a terminal, such as in a CI log
WIDTHS = (8, 4, 5, 9, 4, 8, 9)  # of the columns of a sweep's trials, but the last
_PROGRESS = re.compile(r"\b\d+ ?(/|of) ?\d+\b|\d%")


class Display:
    """Display of the steps as they run. `live` rewrites lines with ANSI codes; otherwise lines are only added."""

    def __init__(self, stream: TextIO, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._live = live
        self._clock = clock
        self._step = ""
        self._over: set[str] = set()
        self._note = ""
        self._result = ""
        self._began = 0.0
        self._printed_at = float("-inf")
        self._seconds: float | None = None

    def start(self, step: str) -> None:
        """Show that a step begins; the step before it is over."""
        self.close()
        self._over.discard(step)
        self._step, self._note, self._result, self._began, self._seconds = step, "", "", self._clock(), None
        self._printed_at = float("-inf")
        if self._live:
            self.tick()
        else:
            self._write(f"[{step}] {STARTED}\n")

    def line(self, line: Line) -> None:
        """Show a line of the step protocol, from whichever step is running. A worker's lines arrive a little later than
        its driver's, and may belong to a step that is over."""
        if line.step != self._step:
            if line.step in self._over and line.text != STARTED:
                return
            self.start(line.step)
        if line.seconds is not None:
            self.finish(line.seconds)
        elif line.text != STARTED and line.failure is None:
            self._say(line.text)

    def finish(self, seconds: float | None = None) -> None:
        """Show that the running step succeeded, in `seconds` if it measured them itself."""
        reported_s = self._seconds
        self._note = self._result or self._note
        self._seconds = seconds if seconds is not None else self._clock() - self._began
        if self._live:
            self._rewrite(f"{self._paint('32', '✓')} {self._row(self._seconds)}")
        elif reported_s is None:
            self._write(f"[{self._step}] finished in {self._seconds:.1f} s\n")

    def fail(self) -> None:
        """Show that the running step, if any, failed or was interrupted."""
        if self._step and self._seconds is None and self._live:
            self._rewrite(f"{self._paint('31', '✗')} {self._row(self._clock() - self._began)}\n")
        self._step = ""

    def tick(self) -> None:
        if self._live and self._step and self._seconds is None:
            now = self._clock()
            mark = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(now * 8) % 10]
            self._rewrite(f"{self._paint('36', mark)} {self._row(now - self._began)}")

    def message(self, text: str) -> None:
        """Show a separate line, above the running step's."""
        if self._live and self._step and self._seconds is None:
            self._rewrite(f"{text}\n")
            self.tick()
            return
        if self._live:
            self.close()
        self._write(f"{text}\n")

    def _say(self, text: str) -> None:
        if text.startswith("| "):  # a row of a table, with cells separated by spaces, stays above the step's line
            *cells, last = text.removeprefix("| ").split(maxsplit=len(WIDTHS))
            row = "  ".join([*(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False)), last])
            if self._live:
                self._rewrite(f"  {row}\n")
                self.tick()
            else:
                self._write(f"[{self._step}] {row}\n")
            return
        self._note = text
        if "held-out loss" in text:  # stays beside the finished step, whatever it says after it
            self._result = text
        if self._live:
            self.tick()
            return
        is_progress = _PROGRESS.search(text) is not None
        if is_progress and self._clock() - self._printed_at < PLAIN_EVERY_S:
            return
        if is_progress:
            self._printed_at = self._clock()
        self._write(f"[{self._step}] {text}\n")

    def close(self) -> None:
        if self._step and self._live:
            if self._seconds is None:
                self.finish()
            assert self._seconds is not None
            self._rewrite(f"{self._paint('32', '✓')} {self._row(self._seconds)}\n")  # not cut: it stays
        self._over.add(self._step)
        self._step = ""

    def _row(self, seconds: float) -> str:
        return f"{self._step:<9} {seconds:7.1f} s  {self._note}".rstrip()

    def _rewrite(self, text: str) -> None:
        """Replace the current line. Text that ends with a newline is kept whole; other text is cut to the width."""
        codes = sum(map(len, re.findall(r"\x1b\[[0-9;]*m", text)))
        width = shutil.get_terminal_size().columns - 1 + codes
        self._write("\r\x1b[2K" + (text if text.endswith("\n") else text[:width]))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _paint(self, code: str, text: str) -> str:
        return text if os.environ.get("NO_COLOR") else f"\x1b[{code}m{text}\x1b[0m"


def is_live(stream: TextIO) -> bool:
    """Whether lines on this stream can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


EVERY_S = 5.0
QUIET_S = 180.0
TRAINING = "finetune"


class Elsewhere:
    """A run that executes elsewhere, shown from what every run writes to the store: each step's record when it
    ends, and the training's curve every 15 s."""

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
            if self.failed or "report" in self._shown:  # the last step of each run in a pipeline
                return True
            if runs.find(self._store, self._run_id, Evaluation) is None:
                return False
            # A run that only trains ends with its evaluation; with a gate, its pod may take a while to start.
            newest = max(item.last_modified for item in self._store.list(runs.run_key(self._run_id)))
            return (datetime.now(UTC) - newest).total_seconds() > QUIET_S
        except StoreError as exc:
            self._display.message(f"the store does not answer, and is asked again: {exc}")
            return False

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
        curve = self._store.read(key)
        records = runs.parse_metrics(curve[0].decode(), origin=key) if curve else []
        if not records:
            return
        if not self._is_training:
            self._is_training = True
            self._display.start(TRAINING)
        steps = [record for record in records if record["kind"] == "train"]
        measured = [record for record in records if record["kind"] == "eval" and record["loss"] is not None]
        text = [f"step {step['step']}/{step['num_steps']}  loss {step['loss']:.3f}" for step in steps[-1:]]
        text += [f"held-out {point['loss']:.4f} at step {point['step']}" for point in measured[-1:]]
        self._display.line(Line(TRAINING, "  ".join(text)))

    def follow(self) -> None:
        while not self.look():
            until = time.monotonic() + EVERY_S
            while time.monotonic() < until:
                self._display.tick()
                time.sleep(min(0.25, EVERY_S))
        self._display.close()
