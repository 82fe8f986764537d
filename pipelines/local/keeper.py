"""The process that keeps one shared server up while any process uses it: `python -m pipelines.local.keeper store|ray`.

server.py starts it and says what the locks mean. It belongs to no user's session, so that Ctrl-C at a terminal ends
the user and not the server under other users. Killed with SIGKILL it leaves nothing: the server runs under guard.py,
whose standard input ends with this process. Where it fails, failed.txt says why.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from pathlib import Path

from components.shared.errors import FineloopError, GroundError
from pipelines.local.server import Server, Service, start, write_private

logger = logging.getLogger(__name__)

LOOK_S = 0.25


def keep(service: Service, server: Server, endpoint: int) -> None:
    """Keep the server until it has no user and is not pinned, a signal asks to stop, or it ends.

    `endpoint` is the descriptor of its endpoint.json, which this process has locked.

    Raises:
        GroundError: it did not start, or ended by itself.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.append(number))
    users = os.open(service.path("users.lock"), os.O_RDWR | os.O_CREAT, 0o600)

    def is_unused() -> bool:
        """Whether no process uses the server; then none can until this process has ended."""
        with contextlib.suppress(BlockingIOError):
            if not service.pinned:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not service.pinned:
                    return True
                fcntl.flock(users, fcntl.LOCK_UN)  # pinned by a user that came and went between the two looks
        return False

    running = start(server, unwanted=lambda: bool(signals) or is_unused())
    try:
        os.pwrite(endpoint, json.dumps({**running.endpoint, "keeper_pid": os.getpid()}).encode(), 0)
        logger.info("%s is up at %s", service.title, running.endpoint["url"])
        while not signals and not is_unused():
            if running.ended():
                raise GroundError(f"{service.title} ended by itself: see the logs in {service.directory}")
            time.sleep(LOOK_S)
        logger.info("stopping %s: %s", service.title, f"signal {signals[0]}" if signals else "it is not used")
    finally:
        os.ftruncate(endpoint, 0)  # before the server goes
        running.stop()


def main() -> int:
    """Entry point."""
    if os.fork() > 0:  # first, before anything starts a thread: the caller is not kept waiting, and gets no zombie
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("service", choices=("store", "ray"))
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="descriptor of endpoint.json, held")
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
    # It uses the store for as long as this process lives.
    users = store.locked("users.lock", fcntl.LOCK_SH, wait_s=0) if arguments.with_store else contextlib.nullcontext()
    try:
        with users:
            keep(service, server, arguments.lock)
    except FineloopError as exc:
        logger.error("%s", exc)
        write_private(service.path("failed.txt"), str(exc))
        return exc.exit_code
    except Exception as exc:  # a process entry point: who waits for the server must learn why it will not come
        logger.exception("keeping %s failed", service.title)
        write_private(service.path("failed.txt"), f"{service.title} did not start ({type(exc).__name__}: {exc})")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
