"""What a person sees of a run: one line per step, the running one rewritten in place on a terminal."""

import os
import re
import shutil
import time
from collections.abc import Callable
from typing import TextIO

from components.shared.protocol import STARTED, Line

PLAIN_EVERY_S = 5.0
"""Without a terminal, such as in a CI log, progress is printed this often."""
ROW = "| "
"""What a line begins with that is a row of a table, its cells apart by spaces: a sweep's trials."""
WIDTHS = (8, 4, 5, 9, 4, 8, 9)
_PROGRESS = re.compile(r"\b\d+ ?(/|of) ?\d+\b|\d%")
_RESULT = re.compile(r"held-out loss")
"""In what stays beside a step that is over, whatever it said after that."""
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Display:
    """Steps as they come. `live` rewrites lines with ANSI codes; otherwise lines are only ever added."""

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
        """A step begins; the one before it is over."""
        self._settle()
        self._over.discard(step)
        self._step, self._note, self._result, self._began, self._seconds = step, "", "", self._clock(), None
        self._printed_at = float("-inf")
        if self._live:
            self.tick()
        else:
            self._write(f"[{step}] {STARTED}\n")

    def line(self, line: Line) -> None:
        """One line of the step protocol, from whichever step is running.

        What a worker has said comes a little later than what its driver says, and may belong to a step that is over.
        """
        if line.step != self._step:
            if line.step in self._over and line.text != STARTED:
                return
            self.start(line.step)
        if line.seconds is not None:
            self.finish(line.seconds)
        elif line.text != STARTED and line.failure is None:
            self._say(line.text)

    def finish(self, seconds: float | None = None) -> None:
        """The running step succeeded, in `seconds` where it measured them itself."""
        reported_s = self._seconds
        self._note = self._result or self._note
        self._seconds = seconds if seconds is not None else self._clock() - self._began
        if self._live:
            self._rewrite(f"{self._paint('32', '✓')} {self._row(self._seconds)}")
        elif reported_s is None:
            self._write(f"[{self._step}] finished in {self._seconds:.1f} s\n")

    def fail(self) -> None:
        """The running step, if any, failed or was interrupted."""
        if self._step and self._seconds is None and self._live:
            self._rewrite(f"{self._paint('31', '✗')} {self._row(self._clock() - self._began)}\n")
        self._step = ""

    def close(self) -> None:
        """Nothing more comes."""
        self._settle()

    def tick(self) -> None:
        """Let the clock of the running step go on."""
        if self._live and self._step and self._seconds is None:
            now = self._clock()
            mark = _SPINNER[int(now * 8) % len(_SPINNER)]
            self._rewrite(f"{self._paint('36', mark)} {self._row(now - self._began)}")

    def message(self, text: str) -> None:
        """A line of its own, above that of the running step."""
        if self._live and self._step and self._seconds is None:
            self._rewrite(f"{text}\n")
            self.tick()
            return
        if self._live:
            self._settle()
        self._write(f"{text}\n")

    def _say(self, text: str) -> None:
        if text.startswith(ROW):
            self._add_row(text)
            return
        self._note = text
        if _RESULT.search(text):
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

    def _add_row(self, text: str) -> None:
        """A row of a table that grows above the running step's line; its last column is free."""
        *cells, last = text.removeprefix(ROW).split(maxsplit=len(WIDTHS))
        row = "  ".join([*(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False)), last])
        if self._live:
            self._rewrite(f"  {row}\n")
            self.tick()
        else:
            self._write(f"[{self._step}] {row}\n")

    def _settle(self) -> None:
        if self._step and self._live:
            if self._seconds is None:
                self.finish()
            assert self._seconds is not None
            self._rewrite(f"{self._paint('32', '✓')} {self._row(self._seconds)}\n")  # whole: nothing rewrites it now
        self._over.add(self._step)
        self._step = ""

    def _row(self, seconds: float) -> str:
        return f"{self._step:<9} {seconds:7.1f} s  {self._note}".rstrip()

    def _rewrite(self, text: str) -> None:
        """In the place of the line; what ends with a newline stays as it is, and only what does not is cut to fit."""
        width = shutil.get_terminal_size().columns - 1 + (len(text) - len(_without_codes(text)))
        self._write("\r\x1b[2K" + (text if text.endswith("\n") else text[:width]))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _paint(self, code: str, text: str) -> str:
        return text if os.environ.get("NO_COLOR") else f"\x1b[{code}m{text}\x1b[0m"


def is_live(stream: TextIO) -> bool:
    """Whether lines on this stream can be rewritten."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
