"""sha256 of large files, computed once per machine for as long as a file does not change."""

import hashlib
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

LOCKS = "locks"


def sha256(path: Path) -> str:
    """The sha256 of the file's current content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path, known: Path) -> str:
    """The sha256 of the file, in hex, cached in the folder `known` by the file's path, size, times and inode.

    Processes share the folder; of several that ask at the same time, one computes and the others wait. A folder that
    cannot be written to only costs a new computation each time.
    """
    from filelock import FileLock

    status = path.stat()
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    entry = known / hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    with suppress(OSError):
        return entry.read_text(encoding="ascii")
    with ExitStack() as first:
        with suppress(OSError):
            (known / LOCKS).mkdir(parents=True, exist_ok=True)
            first.enter_context(FileLock(known / LOCKS / entry.name))
            return entry.read_text(encoding="ascii")  # written by the process that was first
        digest = sha256(path)
        with suppress(OSError):
            handle, scratch = tempfile.mkstemp(dir=known)  # renamed when complete, so no process reads half of it
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(digest)
            Path(scratch).rename(entry)
        return digest
