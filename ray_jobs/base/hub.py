"""Downloads from the model hub, where many machines ask at once: one process per machine at a time, with retries.

`huggingface_hub` itself retries for half a minute, without jitter, and does not retry its request for the commit of a
branch or tag (2.4, utils/_http.py and _snapshot_download.py).
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
# Copies of the same weights for other programs: original/ (Meta, OpenAI), consolidated* (Mistral), onnx/.
NEVER = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]
TRIES = 6
AGAIN_S = 10.0
"""Seconds before the first retry, doubled each time, with a jitter of 50 %: about five minutes in all, which is the
window of the hub's rate limits."""
BUSY = {408, 429, 500, 502, 503, 504}


def snapshot(config: ModelConfig, patterns: Sequence[str]) -> Path:
    """Download the files of a hub model that match `patterns`, and its own code where the config trusts it; returns the
    local folder.

    Raises:
        ConfigError: the hub does not know `model.base` or `model.revision`, or it cannot be reached.
        JobError: the hub is still too busy after all retries.
    """
    from filelock import FileLock
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reference, revision = config.base, config.revision or None
    wanted = [*patterns, *(CODE_FILES if config.trust_remote_code else [])]
    lock = cache_dir() / f"hub-{hashlib.sha256(reference.encode()).hexdigest()[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):  # the next process finds a commit's files in the cache, without a request to the hub
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
    """Whether a hub model has files that match `pattern`; their listing was cached with the first download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        found = snapshot_download(name, revision=commit, allow_patterns=pattern, ignore_patterns=NEVER, dry_run=True)
    except DryRunError:  # the listing is not cached and the hub cannot be reached
        return False
    return bool(found)


def _patiently(reference: str, ask: Callable[[], T]) -> T:
    """Call `ask` and retry while the hub is too busy; returns its result.

    Raises:
        JobError: the hub is still too busy after TRIES attempts.
    """
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
