"""The local cache of bases and other files, downloaded or built, shared by all processes on a machine."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_dir() -> Path:
    """The folder of downloaded and converted bases, inside the cache: $FINELOOP_CACHE, or ~/.cache/fineloop."""
    return Path(os.environ.get("FINELOOP_CACHE") or Path.home() / ".cache" / "fineloop") / "bases"


def once(path: Path, build: Callable[[Path], object]) -> None:
    """Build a folder at `path` unless it exists: first in a sibling folder, so that no incomplete build is ever seen.

    Leftovers of a killed process are removed, which is safe since only the holder of the lock builds.
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
    """Remove the subfolders that have not been used for this many seconds; see `touch`.

    Processes that have mapped files from them into memory keep those.
    """
    from filelock import FileLock, Timeout

    def is_unused(path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime < time.time() - seconds
        return False

    for path in [each for each in folder.iterdir() if each.is_dir() and is_unused(each)]:
        with suppress(Timeout), FileLock(f"{path}.lock", timeout=0):
            if is_unused(path):  # checked again, as a process calls `touch` before it waits for the lock
                shutil.rmtree(path, ignore_errors=True)


def touch(path: Path) -> None:
    """Mark a folder as used; call it before `once`."""
    with suppress(FileNotFoundError):
        os.utime(path)
