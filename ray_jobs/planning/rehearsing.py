"""Handling of models whose own code does not run in a rehearsal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from components.shared.errors import ConfigError

logger = logging.getLogger(__name__)


class CannotRehearse(Exception):
    """The model's own code does not run on fake tensors."""


@contextmanager
def rehearsing() -> Iterator[None]:
    """Turn errors in a model's code into CannotRehearse; the traceback is logged, in case the fault is ours."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as exc:
        logger.info("this architecture cannot be rehearsed", exc_info=True)
        raise CannotRehearse(str(exc)) from exc
