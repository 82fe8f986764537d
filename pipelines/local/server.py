"""Servers of this machine: how one is started, and how several processes share one that stops with the last of them.

HOME/<name> is closed to all users but its owner. It has the server's data, secrets, ports and logs, and what its users
agree by; all locks are flock(2), which the kernel releases when a process dies in any way:

    users.lock      held shared by every process that uses the server; the keeper (keeper.py), a detached process, stops
                    the server when it gets it exclusively
    endpoint.json   where the server answers; held exclusively by the keeper, and valid only while it is
    pinned          a plain file; while it exists, the server stays up without users (`fineloop store up`)
"""

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from components.shared.errors import FineloopError, GroundError, UserError
from pipelines.local import guard
from pipelines.step_secrets import without_secrets

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
NEW_PORTS = range(20_000, 32_768)
"""Ports to choose from, below Linux's ephemeral ports: a connection might take one of those before the server does."""
OWNER_ONLY = 0o700
# Another process may take a port between our choice and the bind. And Ray gives its agent 15 s to come up (ray 2.60,
# raylet/node_manager.cc, WaitForDashboardAgentPorts), which a busy machine may not.
ATTEMPTS = 3
POLL_S = 0.05
STOP_TIMEOUT_S = 30.0


class Server(Protocol):
    """What is specific to one kind of server. `ports` are always those that it was, or is to be, started on."""

    title: ClassVar[str]
    """What people call it."""
    num_ports: ClassVar[int]
    orphan_signal: ClassVar[signal.Signals]
    """What ends it when its guard dies by force."""
    start_timeout_s: ClassVar[float]

    @property
    def directory(self) -> Path:
        """Where its data, secrets, ports and logs lie; absolute."""

    def command(self, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
        """Its command line and environment; what they name is made first."""

    def answers(self, ports: Sequence[int]) -> bool:
        """Whether it does its work already. Raises GroundError where waiting does not help."""

    def endpoint(self, ports: Sequence[int]) -> dict[str, Any]:
        """What its clients need to know, as JSON; `url` at least."""

    def clear(self, ports: Iterable[int]) -> None:
        """Remove what one that is gone, however it went, left outside `directory`."""


@dataclass(frozen=True)
class Running:
    """A server that was started; `process` guards it and everything it starts."""

    server: Server
    ports: tuple[int, ...]
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> dict[str, Any]:
        """What its clients need to know."""
        return self.server.endpoint(self.ports)

    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.process.poll() is not None

    def stop(self) -> None:
        """Stop it, by force when it does not go on its own, and wait until it is gone."""
        guard.stop(self.process)
        self.server.clear(self.ports)


def start(server: Server, *, unwanted: Callable[[], bool] = lambda: False) -> Running:
    """Start it, on the ports of last time where they are free, and wait until it answers.

    Raises:
        GroundError: it is not installed, did not answer in time, or became `unwanted` meanwhile.
    """
    remembered, what = private_folder(server.directory) / "ports.json", ""
    for _ in range(ATTEMPTS):
        earlier: list[int] = []
        with contextlib.suppress(OSError, ValueError, TypeError):
            earlier = [int(port) for port in json.loads(remembered.read_text(encoding="ascii"))]
        ports = choose_ports(server.num_ports, earlier=earlier)
        server.clear(set(earlier) & set(ports))  # left by one that was killed
        remembered.write_text(json.dumps(ports), encoding="ascii")
        command, environment = server.command(ports)
        with (server.directory / "server.log").open("wb") as log:
            process = guard.start(
                command,
                orphan_signal=server.orphan_signal,
                environment=environment,
                directory=server.directory,
                stdout=log.fileno(),
                umask=0o077,
            )
        running, deadline = Running(server, tuple(ports), process), time.monotonic() + server.start_timeout_s
        try:
            while time.monotonic() < deadline and not running.ended():
                if unwanted():
                    raise GroundError(f"{server.title} was not wanted any more before it answered")
                if server.answers(ports):
                    return running
                time.sleep(POLL_S)
        except BaseException:
            running.stop()
            raise
        what = "ended at once" if running.ended() else f"did not answer within {server.start_timeout_s:.0f} s"
        running.stop()
        remembered.unlink()  # whatever was wrong, the next attempt takes other ports
    raise GroundError(f"{server.title} {what}: see the logs in {server.directory}")


def choose_ports(count: int, *, earlier: Sequence[int] = ()) -> list[int]:
    """`count` different ports that no process listens on now, `earlier` ones first and in their order.

    Another process may take one before its server binds it: a caller that starts a server tries again with other ports.
    """
    offset = random.randrange(len(NEW_PORTS))
    # Side by side: servers that start at once then choose the same port a fifth as often as with each drawn by itself.
    new = itertools.chain(NEW_PORTS[offset:], NEW_PORTS[:offset], itertools.repeat(0, count))
    with contextlib.ExitStack() as stack:  # all held at once, so that all differ
        ports = []
        for place in range(count):
            candidates = itertools.chain(earlier[place : place + 1], new)
            held = stack.enter_context(next(held for port in candidates if (held := _listening(port)) is not None))
            ports.append(held.getsockname()[1])
        return ports


def _listening(port: int) -> socket.socket | None:
    """A socket that listens there, if one can."""
    found = socket.socket()
    # A port whose last connections are still in TIME_WAIT counts as free, as it does for a server.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((LOOPBACK, port))
        found.listen()  # with SO_REUSEADDR two sockets may bind one port, but only one may listen
    except (OSError, OverflowError):
        found.close()
        return None
    return found


@dataclass(frozen=True)
class Service:
    """The shared server `name` of one home. `title` is its name in messages."""

    name: str
    title: str
    home: Path
    start_timeout_s: float

    @property
    def directory(self) -> Path:
        """Folder of its locks, logs and data."""
        return self.home / self.name

    @property
    def pinned(self) -> bool:
        """Whether the server stays up without users."""
        return (self.directory / "pinned").exists()

    def path(self, name: str) -> Path:
        """Return the path of a file in its directory, which is created if it is missing."""
        return private_folder(self.directory) / name

    @contextlib.contextmanager
    def locked(self, name: str, kind: int, *, wait_s: float) -> Iterator[int]:
        """Hold a lock on a file of its directory, and yield the descriptor.

        Raises:
            GroundError: other processes hold it for longer than `wait_s`.
        """
        descriptor = os.open(self.path(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise GroundError(f"{self.title} is held by another process: {self.path(name)}") from None
                    time.sleep(POLL_S)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def use(self, *, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Use the server, and start it if it is not up; it stays up while this context, or another one, is open.

        Yields the endpoint once the server answers. `arguments` and `environment` are for the keeper, and have no
        effect if a keeper is running. Ctrl-C waits until a server without other users has stopped.

        Raises:
            GroundError: the server did not start; the message is the keeper's. Or the context failed because the
                server ended by itself.
        """
        try:
            # A keeper that is stopping the server holds this lock exclusively for some seconds.
            with self.locked("users.lock", fcntl.LOCK_SH, wait_s=STOP_TIMEOUT_S):
                endpoint = self._started(arguments, environment)
                try:
                    yield endpoint
                except FineloopError as exc:
                    if self.endpoint() is not None or isinstance(exc, UserError):
                        raise
                    ended = GroundError(f"{self.title} ended while it was in use: see the logs in {self.directory}")
                    for note in (f"what failed then: {exc}", *getattr(exc, "__notes__", [])):
                        ended.add_note(note)
                    raise ended from exc
        except KeyboardInterrupt:
            if not self.pinned and self.users() is None:
                self._wait_until_stopped()
            raise

    def _started(self, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """Return the endpoint once the server answers, of a keeper that is there or else is started."""
        failed, log_path, is_ours = self.path("failed.txt"), self.path("keeper.log"), False
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if (endpoint := self.endpoint()) is not None:
                return endpoint
            with self._keeper_lock() as lock:
                if lock is not None and is_ours:  # it has ended
                    why = failed.read_text(encoding="utf-8") if failed.exists() else ""
                    raise GroundError(why or f"{self.title} ended: see {log_path}")
                if lock is not None:
                    is_ours = True
                    failed.unlink(missing_ok=True)
                    command = [sys.executable, "-P", "-m", "pipelines.local.keeper", self.name]
                    with log_path.open("ab") as log:
                        # It forks, and the first process ends at once, so that init adopts the keeper.
                        subprocess.run(
                            [*command, "--home", str(self.home), "--lock", str(lock), *arguments],
                            pass_fds=[lock],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            env={**without_secrets(environment), "PYTHONPATH": python_path(environment)},
                            cwd=self.directory,
                            start_new_session=True,
                            check=False,  # a keeper that did not start has released its lock
                        )
            time.sleep(POLL_S)
        raise GroundError(f"{self.title} did not answer within {self.start_timeout_s:.0f} s: see {log_path}")

    @contextlib.contextmanager
    def _keeper_lock(self) -> Iterator[int | None]:
        """Yield the keeper's lock, on an empty endpoint.json, for the keeper to inherit; None if there is a keeper."""
        descriptor = os.open(self.path("endpoint.json"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)  # before the lock is exclusive: then others take what is there for valid
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield descriptor
        finally:
            os.close(descriptor)  # a keeper that was started has its own copy, and so keeps the lock

    def endpoint(self) -> dict[str, Any] | None:
        """Return the endpoint of the server that is up now; None if none is. Starts nothing."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # the keeper is writing it
            if self.is_kept():
                found: dict[str, Any] = json.loads((self.directory / "endpoint.json").read_text(encoding="utf-8"))
                return found
        return None

    def is_kept(self) -> bool:
        """Whether a keeper lives."""
        try:
            with (self.directory / "endpoint.json").open() as endpoint:
                fcntl.flock(endpoint, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except BlockingIOError:
            return True
        return False

    def users(self) -> list[int] | None:
        """Return the users' process ids; None if there are no users, empty if they cannot be determined (no /proc)."""
        try:
            with self.locked(
                "users.lock", fcntl.LOCK_EX, wait_s=4 * POLL_S
            ):  # a keeper that looks holds it for moments
                return None
        except GroundError:
            found: set[int] = set()
            with contextlib.suppress(OSError):
                inode = self.path("users.lock").stat().st_ino
                # proc(5): "1: FLOCK  ADVISORY  READ 5433 08:01:7864448 0 EOF"
                locks = Path("/proc/locks").read_text(encoding="ascii")
                found = {
                    int(pid)
                    for pid, number in re.findall(r"^\d+: FLOCK\s+\w+\s+READ\s+(\d+)\s+\S+:(\d+)\s", locks, re.M)
                    if int(number) == inode and int(pid) > 0
                }
            return sorted(found) or (None if self.endpoint() is None else [])  # without an endpoint it is stopping

    def pin(self) -> None:
        """Keep the server up without users, until `down`. Call it inside `use`."""
        self.path("pinned").touch()

    def down(self, *, stop_with: str) -> bool:
        """Unpin the server and wait until it has stopped; return False if it was not up.

        Raises:
            GroundError: it is in use, and stops when that use ends (`stop_with` tells how to end it), or does not stop.
        """
        if not self.directory.is_dir():
            return False
        (self.directory / "pinned").unlink(missing_ok=True)
        if (users := self.users()) is not None:
            who = f" by process {', '.join(map(str, users))}" if users else ""
            raise GroundError(
                f"{self.title} is in use{who}: it is no longer pinned and stops when that ends; {stop_with}"
            )
        return self._wait_until_stopped()

    def _wait_until_stopped(self) -> bool:
        """Wait until a server without users has stopped; return False if it was not up."""
        was_up, deadline = self.is_kept(), time.monotonic() + STOP_TIMEOUT_S
        while self.is_kept():
            if time.monotonic() > deadline:
                raise GroundError(f"{self.title} did not stop within {STOP_TIMEOUT_S:.0f} s: see {self.directory}")
            time.sleep(POLL_S)
        return was_up


def private_folder(path: Path) -> Path:
    """Create the folder if it is missing, close it to all users but its owner, and return it.

    A folder that only its owner may enter protects everything in it, whatever the modes of its files. It does not
    protect TCP ports: the servers behind them require a certificate, a key or a token.

    Raises:
        UserError: it cannot be created or written.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
        if path.stat().st_mode & 0o777 != OWNER_ONLY:
            path.chmod(OWNER_ONLY)
        if not os.access(path, os.W_OK):
            raise PermissionError("it is not yours, or its file system is read-only")
    except OSError as exc:
        reason = exc.strerror or exc
        raise UserError(f"{path} cannot be written ({reason}): --home takes a folder of your own") from exc
    return path


def write_private(path: Path, text: str) -> None:
    """Replace `path` atomically by a file that only its owner can read."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600, exist_ok=False)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def python_path(environment: Mapping[str, str]) -> str:
    """Return PYTHONPATH with this code's root first, so that `python -m` finds the three packages from any folder."""
    others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
    return os.pathsep.join([str(ROOT), *others])


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set only for the processes of this machine's jobs.

    Without a GPU nothing is compiled here, so that PyTorch's compiler is disabled: bitsandbytes would load it in each
    process, which takes 0.8 s. A user's own setting stays.
    """
    compiles = "TORCHDYNAMO_DISABLE" in environment or shutil.which("nvidia-smi")
    return {"PYTHONPATH": python_path(environment)} | ({} if compiles else {"TORCHDYNAMO_DISABLE": "1"})
