"""A Ray of a test's own, without a dashboard, in a process of its own that drives it and that it ends with.

Not in the test's process, as Ray settles a process's authentication for good.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

ATTEMPTS = 4


def start(num_cpus: int, num_gpus: int | None = None) -> None:
    """Start it here. Ray gives a node 30 seconds, a constant of its own, in which a busy machine may not manage.

    `num_gpus` is a number to it; None means those that are here.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                address="local",  # never another one on this machine
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        except Exception as exc:
            ray.shutdown()
            if attempt == ATTEMPTS - 1 or "timed out during startup" not in str(exc):
                raise
        else:
            return


@contextmanager
def driver(num_cpus: int) -> Iterator[ProcessPoolExecutor]:
    """The process, which runs what is submitted to it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start, initargs=(num_cpus,)) as pool:
        yield pool
