"""The process that keeps one shared server up while somebody uses it: `python -m pipelines.local.keeper store|ray`.

service.py starts it and says what the locks mean. It belongs to nobody's session, so that Ctrl-C at a terminal ends the
user and not the server under other users. Killed with SIGKILL it leaves nothing: the server runs under guard.py, whose
standard input ends with this process.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from components.shared.errors import FineloopError, GroundError
from pipelines.local.service import Service, write_private

logger = logging.getLogger(__name__)

LOOK_S = 0.25


class Kept(Protocol):
    """A server that runs."""

    def ended(self) -> bool:
        """Whether it ended by itself."""

    def stop(self) -> None:
        """Stop it and wait until it is gone."""


# Starts the server; calls back with the endpoint as soon as its address is settled; returns endpoint and server when it
# answers.
Start = Callable[[Callable[[dict[str, Any]], None]], tuple[dict[str, Any], Kept]]


def keep(service: Service, start: Start) -> None:
    """Keep the server that `start` starts until it has no user and is not pinned, a signal asks to stop, or it ends.

    Raises:
        GroundError: it did not start, or ended by itself.
    """
    stopping: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    users = os.open(service.path("users.lock"), os.O_RDWR | os.O_CREAT, 0o600)

    def announce(endpoint: dict[str, Any], *, ready: bool = False) -> None:
        text = json.dumps({**endpoint, "ready": ready, "keeper_pid": os.getpid()})
        write_private(service.path("endpoint.json"), text)

    endpoint, kept = start(announce)
    try:
        announce(endpoint, ready=True)
        logger.info("%s is up at %s", service.title, endpoint["url"])
        while not stopping and not _unused(service, users):
            if kept.ended():
                raise GroundError(f"{service.title} ended by itself: see the logs in {service.directory}")
            time.sleep(LOOK_S)
        logger.info("stopping %s: %s", service.title, f"signal {stopping[0]}" if stopping else "nobody uses it")
    finally:
        with contextlib.suppress(FileNotFoundError):  # before the server goes; and the home may be gone
            (service.directory / "endpoint.json").unlink()
        kept.stop()


def _unused(service: Service, users: int) -> bool:
    """Whether nobody uses the server; then nobody new can until this process has ended."""
    if service.pinned:
        return False
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if service.pinned:  # by a user that came and went between the two looks
        fcntl.flock(users, fcntl.LOCK_UN)
        return False
    return True


@contextlib.contextmanager
def _user_of(service: Service | None) -> Iterator[None]:
    """Count as a user of `service` for as long as this process lives."""
    if service is not None:
        held = os.open(service.path("users.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GroundError(f"{service.title} is stopping") from None
    yield


def _detach() -> None:
    """Go on in a child of init: the caller is not kept waiting and gets no zombie."""
    if os.fork() > 0:
        os._exit(0)


def main() -> int:
    """Entry point."""
    _detach()  # first, before anything starts a thread
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("service", choices=("store", "ray"))
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="descriptor of keeper.lock, held")
    parser.add_argument("--bucket", help="store: the bucket to create")
    parser.add_argument("--with-store", action="store_true", help="ray: it uses the store of the same home")
    arguments = parser.parse_args()
    os.set_inheritable(arguments.lock, False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    from pipelines.local import ray_head, store  # they import this package's lighter parts only

    store_service = store.service(arguments.home)
    start: Start
    if arguments.service == "store":
        service, used = store_service, None
        start = lambda announce: store.start(service.directory, arguments.bucket, announce)  # noqa: E731
    else:
        service, used = ray_head.service(arguments.home), store_service if arguments.with_store else None
        start = lambda announce: ray_head.start(service.directory, announce)  # noqa: E731
    try:
        with _user_of(used):
            keep(service, start)
    except FineloopError as exc:
        logger.error("%s", exc)
        with contextlib.suppress(FileNotFoundError):
            write_private(service.path("failed.txt"), str(exc))
        return exc.exit_code
    except Exception as exc:  # a process entry point: who waits for the server must learn why it will not come
        logger.exception("keeping %s failed", service.title)
        write_private(service.path("failed.txt"), f"{service.title} did not start ({type(exc).__name__}: {exc})")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
