"""What becomes of a model whose own code does not run in a rehearsal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from components.shared.errors import ConfigError

logger = logging.getLogger(__name__)


class CannotRehearse(Exception):
    """The model's own code does not run on tensors without memory."""


@contextmanager
def rehearsing() -> Iterator[None]:
    """Raise CannotRehearse for what a model stumbles over; the log has the traceback, should the fault be ours."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as exc:
        logger.info("this architecture cannot be rehearsed", exc_info=True)
        raise CannotRehearse(str(exc)) from exc
