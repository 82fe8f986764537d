"""The model hub, as many machines ask it at once: one process of a machine at a time, and again where it is too busy.

`huggingface_hub` does so for half a minute, without jitter, and does not for what it asks about a branch or tag (2.4,
utils/_http.py and _snapshot_download.py).
"""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, JobError
from ray_jobs.base.local_cache import cache_dir

logger = logging.getLogger(__name__)

T = TypeVar("T")
CODE_FILES = ["*.py"]
# The same weights once more, for other programs: original/ of Meta and OpenAI, consolidated* of Mistral, onnx/.
NEVER = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]
TRIES = 6
AGAIN_S = 10.0
"""Before it is asked again, doubled each time, half as much more or less: five minutes in all, as its rate limits."""
BUSY = {408, 429, 500, 502, 503, 504}


def snapshot(config: ModelConfig, patterns: Sequence[str]) -> Path:
    """Those of a hub model's files that match, on this machine, and its own code where the config trusts it.

    Raises:
        ConfigError: `model.base` or `model.revision` is none that the hub knows, or the hub cannot be reached.
        JobError: the hub is too busy, and stays so.
    """
    from filelock import FileLock
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reference, revision = config.base, config.revision or None
    wanted = [*patterns, *(CODE_FILES if config.trust_remote_code else [])]
    lock = cache_dir() / f"hub-{hashlib.sha256(reference.encode()).hexdigest()[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):  # whoever comes next finds the files of a commit, and asks the hub nothing
            found = _patiently(
                reference,
                lambda: snapshot_download(reference, revision=revision, allow_patterns=wanted, ignore_patterns=NEVER),
            )
        return Path(found)
    except HFValidationError as exc:
        raise ConfigError(f"model.base {reference!r} is neither a local folder nor a hub id: {exc}") from exc
    except LocalEntryNotFoundError as exc:
        raise ConfigError(
            f"model.base {reference!r}: no such local folder, and the model hub cannot be reached to look for it there"
        ) from exc
    except HfHubHTTPError as exc:
        where = f" at model.revision {revision!r}" if revision else ""
        raise ConfigError(f"model.base {reference!r}{where}: the model hub refuses it: {exc}") from exc


def offers(name: str, commit: str, pattern: str) -> bool:
    """Whether a model has such files; what lists them has been fetched with the first of them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        found = snapshot_download(name, revision=commit, allow_patterns=pattern, ignore_patterns=NEVER, dry_run=True)
    except DryRunError:  # it is neither on this machine nor in reach
        return False
    return bool(found)


def _patiently(reference: str, ask: Callable[[], T]) -> T:
    """What the hub answers, asked again while it is too busy.

    Raises:
        JobError: it stays so.
    """
    for number in range(TRIES):
        try:
            return ask()
        except Exception as exc:  # of many kinds, some with the hub's answer as their cause
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
    """The HTTP status that an error comes from; 0 without one."""
    from huggingface_hub.errors import HfHubHTTPError

    while exc is not None and not isinstance(exc, HfHubHTTPError):
        exc = exc.__cause__
    return exc.response.status_code if exc is not None else 0
