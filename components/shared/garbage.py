"""Keep Python's garbage collector from scanning what never becomes garbage: the modules of large libraries.

torch, transformers and peft are hundreds of thousands of functions and classes. While they are imported, or as many
other objects are made, the collector scans all of them again and again, for a quarter of the time and more. When the
process ends it scans once more, for up to a second and a half.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Pause the collector within the `with` block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Pause the collector within the block. If anything was imported, it never scans what exists at the block's end."""
    num_modules = len(sys.modules)
    with paused():
        try:
            yield
        finally:
            if len(sys.modules) > num_modules:
                gc.freeze()


@contextmanager
def of_new_objects() -> Iterator[None]:
    """Let the collector scan what is made within the block alone: rows have no reference cycles, and a scan of all
    after every few batches took a third of the time to read them. What no scan saw before, none sees afterwards."""
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:  # Python unfreezes everything or nothing
            gc.unfreeze()


def leave_at_exit() -> None:
    """Skip the scan when this process ends: whatever exists then goes with its memory."""
    atexit.register(gc.freeze)
