"""Patience with a store that is away: a training of days does not end because of some minutes of it."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from components.shared.errors import StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")
AGAIN_S = 10.0


def is_away(exc: StoreError) -> bool:
    """Whether the store could not be reached, or refused; nothing that it holds was wrong."""
    return type(exc) is StoreError


class Patience:
    """Counts how long a store has been away."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def lose(self, exc: StoreError, then: str) -> None:
        """The store is away; `then` says what goes on meanwhile.

        Raises:
            StoreError: `exc`, where that is no matter of patience, or there is none left.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left = self._since + self._seconds - now
        if not is_away(exc) or left <= 0:
            raise exc
        logger.warning("%s, for another %.0f s at most (train.store_patience_s): %s", then, left, exc)

    def regain(self) -> None:
        """The store is there again."""
        self._since = None


def patiently(seconds: float, act: Callable[[], T], then: str) -> T:
    """What `act` gives, tried again while the store is away.

    Raises:
        StoreError: it was away for longer, or has something that is wrong.
    """
    patience = Patience(seconds)
    while True:
        try:
            return act()
        except StoreError as exc:
            patience.lose(exc, then)
        time.sleep(min(AGAIN_S, seconds))
