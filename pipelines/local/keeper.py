"""Keeps one shared server up while a process uses it: `python -m pipelines.local.keeper store|ray HOME [BUCKET]`.

server.py starts it, in a session of its own: Ctrl-C at a terminal ends the user and not the server under other users.
Killed by force it leaves nothing: the server runs under guard.py, whose standard input ends with it. Its own standard
output says why the server did not come up, and is closed when it has.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from components.shared.errors import FineloopError, GroundError
from pipelines.local.server import POLL_S, Server, Service, start

logger = logging.getLogger(__name__)
LOOK_S = 0.25


def keep(service: Service, server: Server) -> None:
    """Keep the server until it has no user and is not pinned, a signal asks to stop, or it ends. Raises GroundError: it
    did not start, or ended by itself."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.append(number))
    users = service.path("users.lock").open("a")

    def is_unwanted() -> bool:
        if signals:
            return True
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if pinned := service.pinned:
            fcntl.flock(users, fcntl.LOCK_UN)
        return not pinned  # with the lock: no process becomes a user until this one has ended

    running = start(server, is_unwanted=is_unwanted)
    try:
        unfinished = service.path("endpoint.json.new")
        with unfinished.open("w", encoding="utf-8") as endpoint:
            fcntl.flock(endpoint, fcntl.LOCK_EX)
            json.dump({**running.endpoint, "keeper_pid": os.getpid()}, endpoint)
            endpoint.flush()
            unfinished.rename(service.path("endpoint.json"))
            logger.info("%s is up at %s", service.title, running.endpoint["url"])
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            while not is_unwanted():
                if running.ended():
                    raise GroundError(f"{service.title} ended by itself: see the logs in {service.directory}")
                time.sleep(LOOK_S)
        logger.info("stopping %s", service.title)
    finally:
        running.stop()


def main(name: str, home: Path, bucket: str) -> int:
    """Entry point. `bucket` is made in a store; with a head it says that the head uses the store of the same home."""
    if os.fork() > 0:  # init adopts the keeper, and the caller gets no zombie
        os._exit(0)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    from pipelines.local.local_services import ray_service, store_service
    from pipelines.local.ray_head import RayHead
    from pipelines.local.seaweedfs import SeaweedFS

    service = store_service(home) if name == "store" else ray_service(home)
    lock = os.open(service.path("keeper.lock"), os.O_RDWR | os.O_CREAT)  # closed by the kernel alone
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # held by one that stops its server, or by one that starts it
            if service.endpoint() is not None:
                return 0
            time.sleep(POLL_S)
    try:
        with contextlib.ExitStack() as stack:
            if name == "ray" and bucket:
                fcntl.flock(stack.enter_context(store_service(home).path("users.lock").open("a")), fcntl.LOCK_SH)
            directory = service.directory
            keep(service, SeaweedFS(directory, bucket) if name == "store" else RayHead(directory))
        return 0
    except Exception as exc:  # a process's entry point: who waits for the server must learn why it will not come
        logger.exception("keeping %s failed", service.title)
        why = str(exc) if isinstance(exc, FineloopError) else f"{service.title} failed ({type(exc).__name__}: {exc})"
        with contextlib.suppress(OSError):  # who waited was killed
            os.write(sys.stdout.fileno(), why.encode())
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
