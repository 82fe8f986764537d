"""Writes a run's curve as TensorBoard event files to its folder while it runs, if tensorboardX is installed."""

import contextlib
import importlib.util
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.records import runs
from components.records.steps import scalars
from components.report.report import parse_metrics
from components.shared.errors import FineloopError

if TYPE_CHECKING:
    from components.store.store import Store

FOLDER = "tensorboard"
EVERY_S = 15.0
"""Seconds between reads of the curve; a training uploads it as often."""
LAST_S = 10.0
"""Seconds that the end of a run waits at most for the rest of the curve, such as when the store is unavailable."""


@contextlib.contextmanager
def beside(store: "Store", run_id: str, folder: Path) -> Iterator[None]:
    """Write a run's event files in a thread; only the end of the context waits for it."""
    if importlib.util.find_spec("tensorboardX") is None:
        yield
        return
    files, is_over = EventFiles(store, run_id, folder), threading.Event()

    def follow() -> None:
        while not is_over.wait(EVERY_S):
            files.follow()
        files.follow()
        files.close()

    thread = threading.Thread(target=follow, name="event files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(LAST_S)


class EventFiles:
    """Event files of one run, with what has been written of its runs/<run_id>/metrics.jsonl so far."""

    def __init__(self, store: "Store", run_id: str, folder: Path) -> None:
        self._store, self._key, self._folder = store, runs.run_key(run_id, runs.METRICS), folder / FOLDER
        self._written: set[tuple[str, float]] = set()
        self._writer: Any = None

    def follow(self) -> None:
        """Add new records; errors of the store are ignored, since it is read again later."""
        with contextlib.suppress(FineloopError):
            found = self._store.read(self._key)
            self._add(parse_metrics(found[0].decode(), origin=self._key) if found else [])

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, records: list[dict[str, Any]]) -> None:
        new = [each for each in records if (each["kind"], each["step"]) not in self._written]
        if new and self._writer is None:
            with warnings.catch_warnings():
                # tensorboardX imports Google's storage client if it is installed, and that lacks one of its packages.
                warnings.simplefilter("ignore", ImportWarning)
                from tensorboardX import SummaryWriter
            self._writer = SummaryWriter(str(self._folder))
        for record in new:
            self._written.add((record["kind"], record["step"]))
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, int(record["step"]))
        if self._writer is not None:
            self._writer.flush()  # writes what its thread has taken so far; the newest may wait for the next call
