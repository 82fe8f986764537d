"""The local cache of bases and other files, downloaded or built, shared by all processes on a machine."""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from components.config.schema import ModelConfig
from components.shared import garbage
from components.shared.errors import ConfigError, IntegrityError, JobError
from components.shared.machine import replaced

logger = logging.getLogger(__name__)

T = TypeVar("T")


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

    for path in [path for path in folder.iterdir() if path.is_dir() and is_unused(path)]:
        with suppress(Timeout), FileLock(f"{path}.lock", timeout=0):
            if is_unused(path):  # checked again, as a process calls `touch` before it waits for the lock
                shutil.rmtree(path, ignore_errors=True)


def touch(path: Path) -> None:
    """Mark a folder as used; call it before `once`."""
    with suppress(FileNotFoundError):
        os.utime(path)


# sha256 of large files, computed once per machine for as long as a file does not change.

LOCKS = "locks"


def sha256(path: Path) -> str:
    """The sha256 of the file's current content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path, folder: Path | None = None) -> str:
    """The sha256 of the file, in hex, cached in a folder of this machine by the file's path, size, times and inode.

    Processes share the folder; of several that ask at the same time, one computes and the others wait. A folder that
    cannot be written to only costs a new computation each time.
    """
    from filelock import FileLock

    folder = folder or cache_dir().with_name("digests")
    status = path.stat()
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    entry = folder / hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    with suppress(OSError):
        return entry.read_text(encoding="ascii")
    with ExitStack() as first:
        with suppress(OSError):
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
            first.enter_context(FileLock(folder / LOCKS / entry.name))
            return entry.read_text(encoding="ascii")  # written by the process that was first
        digest = sha256(path)
        with suppress(OSError):
            handle, scratch = tempfile.mkstemp(dir=folder)  # renamed when complete, so no process reads half of it
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(digest)
            Path(scratch).rename(entry)
        return digest


def local_path(reference: str) -> Path | None:
    """The folder, or the GGUF of an installed package, that `model.base` names on this machine; None for a hub id and
    for a folder in S3. Raises ConfigError: it has no known form, or names a folder or a package file that does not
    exist."""
    if reference.startswith("pkg://"):
        return _packaged(reference)
    if reference.startswith("s3://"):
        return None
    if "://" in reference:
        raise ConfigError(f"model.base {reference!r}: expected a hub id, a local folder, s3://... or pkg://...")
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or reference.startswith("."):
        raise ConfigError(f"model.base {reference}: there is no such folder")
    return None


def _packaged(reference: str) -> Path:
    package, _, file = reference.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.base {reference}: the Python package {package!r} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if path.suffix != ".gguf" or not path.is_file():
        files = sorted(gguf.relative_to(folder).as_posix() for gguf in folder.rglob("*.gguf"))
        raise ConfigError(f"model.base {reference}: package {package!r} holds no {file!r}; its GGUF files are {files}")
    return path


# GGUF files of packages, converted to transformers' format.

DIGESTS = "sha256.json"  # beside a converted base: the sha256 of each of its files


def conversion(gguf: Path) -> Path:
    """The folder that the file's conversion has, or will have."""
    return cache_dir() / f"gguf-{remembered(gguf)[:16]}"


def converted(gguf: Path) -> Path:
    """Convert the file, once per machine; returns the folder. Raises IntegrityError: the folder has changed since."""
    path = conversion(gguf)
    once(path, lambda target: _convert_gguf(gguf, target))
    try:
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise IntegrityError(f"the converted base has no readable {path / DIGESTS}: delete {path}") from exc
    for name, expected in digests.items():
        if not (path / name).is_file() or remembered(path / name) != expected:
            raise IntegrityError(f"the converted base {path / name} has changed since it was written: delete {path}")
    return path


def _convert_gguf(source: Path, target: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    class Reader(gguf.GGUFReader):
        """Reads from a plain array: slicing numpy's memmap was a third of the conversion."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    logger.info("converting %s to safetensors, once", source.name)
    # transformers parses the file's vocabulary once each for configuration, weights and tokenizer, and builds the table
    # of tensor names for each module: half of the time. Garbage collection over the vocabulary is a sixth of the rest.
    cached = {"GGUFReader": functools.cache(Reader), "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map)}
    with garbage.paused(), replaced(gguf, **cached):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # quantised weights could not be saved
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.should_save_on_this_rank = lambda _: True  # by default only rank 0 saves, but here each machine converts
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    digests = {path.name: sha256(path) for path in sorted(target.iterdir())}
    (target / DIGESTS).write_text(json.dumps(digests, indent=2), encoding="utf-8")


# Downloads from the model hub, where many machines ask at once: one process per machine at a time, with retries.
#
# `huggingface_hub` itself retries for half a minute, without jitter, and does not retry its request for the commit of a
# branch or tag (2.4, utils/_http.py and _snapshot_download.py).

CODE_FILES = ["*.py"]
# Copies of the same weights for other programs: original/ (Meta, OpenAI), consolidated* (Mistral), onnx/.
NEVER = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]
TRIES = 6
AGAIN_S = 10.0
"""Seconds before the first retry, doubled each time, with a jitter of 50 %: about five minutes in all, which is the
window of the hub's rate limits."""
BUSY = {408, 429, 500, 502, 503, 504}


def snapshot(config: ModelConfig, patterns: Sequence[str]) -> Path:
    """Download the files of a hub model that match `patterns`, and its own code where the config trusts it; returns the
    local folder. Raises ConfigError: the hub does not know `model.base` or `model.revision`, or it cannot be reached;
    JobError: the hub is still too busy after all retries."""
    from filelock import FileLock
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reference, revision = config.base, config.revision or None
    wanted = [*patterns, *(CODE_FILES if config.trust_remote_code else [])]
    lock = cache_dir() / f"hub-{hashlib.sha256(reference.encode()).hexdigest()[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):  # the next process finds a commit's files in the cache, without a request to the hub
            folder = _patiently(
                reference,
                lambda: snapshot_download(reference, revision=revision, allow_patterns=wanted, ignore_patterns=NEVER),
            )
        return Path(folder)
    except HFValidationError as exc:
        raise ConfigError(f"model.base {reference!r} is neither a local folder nor a hub id: {exc}") from exc
    except LocalEntryNotFoundError as exc:
        raise ConfigError(
            f"model.base {reference!r}: no such local folder, and the model hub cannot be reached to look for it there"
        ) from exc
    except HfHubHTTPError as exc:
        where = f" at model.revision {revision!r}" if revision else ""
        raise ConfigError(f"model.base {reference!r}{where}: the model hub refuses it: {exc}") from exc


def _patiently(reference: str, ask: Callable[[], T]) -> T:
    """Call `ask` and retry while the hub is too busy; returns its result. Raises JobError: the hub is still too busy
    after TRIES attempts."""
    for number in range(TRIES):
        try:
            return ask()
        except Exception as exc:  # many types, some with the HTTP error as their cause
            status = _status(exc)
            if status not in BUSY:
                raise
            if number == TRIES - 1:
                raise JobError(
                    f"model.base {reference!r}: the model hub is too busy, with status {status} after {TRIES} tries: "
                    "set HF_TOKEN, which raises its limits, or put the base into S3"
                ) from exc
            wait_s = AGAIN_S * 2**number * random.uniform(0.5, 1.5)
            logger.warning("the model hub is too busy for %s (%s): again in %.0f s", reference, status, wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last try raises")


def _status(exc: BaseException | None) -> int:
    """The HTTP status in an error or in its chain of causes; 0 where there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    while exc is not None and not isinstance(exc, HfHubHTTPError):
        exc = exc.__cause__
    return exc.response.status_code if exc is not None else 0
