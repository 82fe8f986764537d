"""What this machine keeps of the store, of the hub and of its own making, for all processes on it."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_dir() -> Path:
    """Where downloaded and converted bases are kept, beside what else is: $FINELOOP_CACHE, or ~/.cache/fineloop."""
    return Path(os.environ.get("FINELOOP_CACHE") or Path.home() / ".cache" / "fineloop") / "bases"


def once(path: Path, build: Callable[[Path], object]) -> None:
    """Build a folder at `path` unless it is there: in a sibling first, so that a broken build is never seen.

    What a killed process has left is removed: only the holder of the lock builds.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        scratch = path.with_name(f".building-{path.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        try:
            build(scratch)
            scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def forget_unused(folder: Path, seconds: float) -> None:
    """Remove the folders in this one that nobody has asked for in so many seconds; see `touch`.

    Who has mapped their files into memory keeps them.
    """
    from filelock import FileLock, Timeout

    def is_unused(path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime < time.time() - seconds
        return False

    for path in [each for each in folder.iterdir() if each.is_dir() and is_unused(each)]:
        with suppress(Timeout), FileLock(f"{path}.lock", timeout=0):
            if is_unused(path):  # still: who asks for it says so before it waits for the lock
                shutil.rmtree(path, ignore_errors=True)


def touch(path: Path) -> None:
    """Say that a folder is asked for, before `once` is."""
    with suppress(FileNotFoundError):
        os.utime(path)
