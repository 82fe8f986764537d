"""Limits of time and memory for code that a config brings along, such as a regular expression."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from components.shared import memory

SECONDS = 10.0
"""Default time limit; a chat template renders a record in about a millisecond."""
MORE_BYTES = 128 * 2**20
"""Default memory limit, several times the longest text of a record. Multiplying numbers that fit it takes minutes at
most."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, more_bytes: int = MORE_BYTES) -> Iterator[None]:
    """Limit the time of the code within, and the memory it may use beyond what the process has already.

    Time is limited only in a process's main thread, where tokenisation runs; in other threads it is unlimited.

    Raises:
        TimeoutError: the code took longer.
        MemoryError: the code needs more memory.
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
