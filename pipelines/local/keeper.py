"""The process that keeps one shared server up while any process uses it: `python -m pipelines.local.keeper store|ray`.

service.py starts it and says what the locks mean. It belongs to no user's session, so that Ctrl-C at a terminal ends
the user and not the server under other users. Killed with SIGKILL it leaves nothing: the server runs under guard.py,
whose standard input ends with this process.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from components.shared.errors import FineloopError, GroundError
from pipelines.local.server import Server, Service, start, write_private

logger = logging.getLogger(__name__)

LOOK_S = 0.25


def keep(service: Service, server: Server) -> None:
    """Keep the server until it has no user and is not pinned, a signal asks to stop, or it ends.

    Raises:
        GroundError: it did not start, or ended by itself.
    """
    stopping: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    users = os.open(service.path("users.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    running = start(server, unwanted=lambda: bool(stopping) or _unused(service, users))
    try:
        endpoint = {**running.endpoint, "keeper_pid": os.getpid()}
        write_private(service.path("endpoint.json"), json.dumps(endpoint))
        logger.info("%s is up at %s", service.title, endpoint["url"])
        while not stopping and not _unused(service, users):
            if running.ended():
                raise GroundError(f"{service.title} ended by itself: see the logs in {service.directory}")
            time.sleep(LOOK_S)
        logger.info("stopping %s: %s", service.title, f"signal {stopping[0]}" if stopping else "it is not used")
    finally:
        with contextlib.suppress(FileNotFoundError):  # before the server goes; and the home may be gone
            (service.directory / "endpoint.json").unlink()
        running.stop()


def _unused(service: Service, users: int) -> bool:
    """Whether no process uses the server; then none can until this process has ended."""
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

    from pipelines.local.local_services import ray_service, store_service
    from pipelines.local.ray_head import RayHead
    from pipelines.local.seaweedfs import SeaweedFS

    store = store_service(arguments.home)
    service = store if arguments.service == "store" else ray_service(arguments.home)
    server: Server = (
        SeaweedFS(service.directory, arguments.bucket) if arguments.service == "store" else RayHead(service.directory)
    )
    try:
        with _user_of(store if arguments.with_store else None):
            keep(service, server)
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
