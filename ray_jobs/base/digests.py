"""sha256 of large files, read once on a machine for as long as they stay what they are."""

import hashlib
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

LOCKS = "locks"


def sha256(path: Path) -> str:
    """Of the bytes as they lie there now, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path, known: Path) -> str:
    """The same, from the folder `known` where path, size and times of the file are those of an earlier reading.

    Processes share the folder, and those that ask at once wait for the first of them; one that cannot be written to
    costs a reading each time.
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
            return entry.read_text(encoding="ascii")  # of who was
        digest = sha256(path)
        with suppress(OSError):
            handle, scratch = tempfile.mkstemp(dir=known)  # so that no process reads half of it
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(digest)
            Path(scratch).rename(entry)
        return digest
