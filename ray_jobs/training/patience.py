"""Retrying while the store is unreachable, so that a training of days survives some minutes without it."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from components.shared.errors import StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")
AGAIN_S = 10.0


def is_away(exc: StoreError) -> bool:
    """Whether the store could not be reached, or refused the request; false where its content is wrong."""
    return type(exc) is StoreError


class Patience:
    """Tracks how long the store has been unreachable."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def lose(self, exc: StoreError, then: str) -> None:
        """Record that the store is unreachable; `then` says what continues meanwhile, for the log.

        Raises:
            StoreError: `exc`, where retrying would not help, or the time is up.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left = self._since + self._seconds - now
        if not is_away(exc) or left <= 0:
            raise exc
        logger.warning("%s, for another %.0f s at most (train.store_patience_s): %s", then, left, exc)

    def regain(self) -> None:
        """Record that the store is reachable again."""
        self._since = None


def patiently(seconds: float, act: Callable[[], T], then: str) -> T:
    """Call `act`, and retry while the store is unreachable; returns its result.

    Raises:
        StoreError: the store was unreachable for too long, or its content is wrong.
    """
    patience = Patience(seconds)
    while True:
        try:
            return act()
        except StoreError as exc:
            patience.lose(exc, then)
        time.sleep(min(AGAIN_S, seconds))
