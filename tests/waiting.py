"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 300.0
"""Far more than anything takes on a machine with other work to do: who waits so long has found a fault. How fast
something is, the benchmarks say."""


def wait_until(condition: Callable[[], T], otherwise: object = "") -> T:
    """What `condition` finds, as soon as it is true; `otherwise`, which may be a function, is the failure's text."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE_S:.0f} s: {otherwise() if callable(otherwise) else otherwise}")
        time.sleep(0.02)
    return found
