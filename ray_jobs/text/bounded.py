"""Bounds for what a config brings along to be run here, such as a pattern."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from components.shared import memory

SECONDS = 10.0
"""A template writes a record in a thousandth of one."""
MORE_BYTES = 128 * 2**20
"""Several times the longest text of a record. Numbers of so many digits take no longer to multiply than minutes."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, more_bytes: int = MORE_BYTES) -> Iterator[None]:
    """Give what is done here so much time, and so much memory beyond what the process has.

    Time is taken in a process's main thread alone, where tokenising happens; others have no end to theirs.

    Raises:
        TimeoutError: it took longer.
        MemoryError: it needs more.
    """
    with memory.at_most(more_bytes):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, _time_is_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _time_is_up(*_: Any) -> None:
    raise TimeoutError
