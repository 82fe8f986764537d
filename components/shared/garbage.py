"""Keep Python's garbage collector from scanning what never becomes garbage: the modules of large libraries.

torch, transformers and peft are hundreds of thousands of functions and classes. While they are imported, or as much is
made of something else, the collector scans all of it again and again, for a quarter of the time and more; and when a
process ends it scans once more, for up to a second and a half.
"""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is looked for within."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Nothing is looked for within, and what is there at its end never, if anything has been imported."""
    num_modules = len(sys.modules)
    with paused():
        try:
            yield
        finally:
            if len(sys.modules) > num_modules:
                gc.freeze()


def leave_at_exit() -> None:
    """Whatever is there when this process ends goes with its memory."""
    atexit.register(gc.freeze)
