"""Servers of this machine: how one is started, and how several processes share one that stops with the last of them."""

import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
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
    num_ports: ClassVar[int]
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
        return self.server.endpoint(self.ports)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Stop it, by force when it does not go on its own, and wait until it is gone."""
        guard.stop(self.process)
        self.server.clear(self.ports)


def start(server: Server, *, is_unwanted: Callable[[], bool] = lambda: False) -> Running:
    """Start it, on the ports of last time where they are free, and wait until it answers. Raises GroundError: it is not
    installed, did not answer in time, or became unwanted meanwhile."""
    remembered, what = private_folder(server.directory) / "ports.json", ""
    for _ in range(ATTEMPTS):
        earlier: list[int] = []
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(remembered.read_text(encoding="ascii"))
        ports = choose_ports(server.num_ports, earlier=earlier)
        server.clear(set(earlier) & set(ports))  # left by one that was killed
        remembered.write_text(json.dumps(ports), encoding="ascii")
        command, environment = server.command(ports)
        with (server.directory / "server.log").open("wb") as log:
            process = guard.start(command, environment=environment, directory=server.directory, stdout=log.fileno())
        running, deadline = Running(server, tuple(ports), process), time.monotonic() + server.start_timeout_s
        try:
            while time.monotonic() < deadline and not running.ended():
                if is_unwanted():
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
    """`count` different ports that no process listens on now, `earlier` ones first and in their order. Another process
    may take one before its server binds it: a caller that starts a server tries again with other ports."""
    offset = random.randrange(len(NEW_PORTS))
    # Side by side: servers that start at once then choose the same port a fifth as often as with each drawn by itself.
    new = itertools.chain(NEW_PORTS[offset:], NEW_PORTS[:offset])
    ports: list[int] = []
    for place in range(count):
        candidates = itertools.chain(earlier[place : place + 1], new)
        ports.append(next(port for port in candidates if port not in ports and _is_free(port)))
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A port whose last connections are still in TIME_WAIT counts as free, as it does for a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen()  # with SO_REUSEADDR two sockets may bind one port, but only one may listen
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class Service:
    """A server that processes share: it is up while one of them uses it, or while it is pinned.

    HOME/<name>, closed to all users but its owner, has its data, secrets, ports and logs, and what its users agree by;
    all locks are flock(2), which the kernel releases when a process dies in any way:

        users.lock      held shared by every process that uses the server; the keeper (keeper.py), a detached process,
                        stops the server when it gets it exclusively
        keeper.lock     held by the keeper for its life: of several, one starts the server and the others wait for it
        endpoint.json   where the server answers; valid while the keeper holds its lock
        pinned          a plain file; while it exists, the server stays up without users (`fineloop store up`)
    """

    name: str
    title: str
    home: Path

    @property
    def directory(self) -> Path:
        return self.home / self.name

    @property
    def pinned(self) -> bool:
        return (self.directory / "pinned").exists()

    def path(self, name: str) -> Path:
        """Return the path of a file in its directory, which is made where it is missing."""
        return private_folder(self.directory) / name

    @contextlib.contextmanager
    def use(self, *, bucket: str, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Use the server, and start it if it is not up; it stays up while this context, or another one, is open. Yields
        the endpoint once the server answers. `bucket` and `environment` are for a keeper that is started. Raises
        GroundError: the server did not start; the message is the keeper's."""
        try:
            with self.path("users.lock").open("a") as users:
                fcntl.flock(users, fcntl.LOCK_SH)
                why = "" if self.endpoint() else self._start(bucket, environment)
                if (endpoint := self.endpoint()) is None:
                    raise GroundError(why or f"{self.title} ended: see {self.path('keeper.log')}")
                try:
                    yield endpoint
                except FineloopError as exc:
                    if self.endpoint() is None and not isinstance(exc, UserError):
                        exc.add_note(f"{self.title} ended while it was in use: see the logs in {self.directory}")
                    raise
        except KeyboardInterrupt:
            if not self.pinned:
                with contextlib.suppress(GroundError):  # other processes use it
                    self.down()
            raise

    def _start(self, bucket: str, environment: Mapping[str, str]) -> str:
        """Start a keeper and wait until its server answers or it has ended; return the keeper's reason."""
        with self.path("keeper.log").open("ab") as log:
            keeper = subprocess.run(
                [sys.executable, "-P", "-m", "pipelines.local.keeper", self.name, str(self.home), bucket],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**without_secrets(environment), "PYTHONPATH": python_path(environment)},
                cwd=self.directory,
                start_new_session=True,
                text=True,
                check=False,
            )
        return keeper.stdout

    def endpoint(self) -> dict[str, Any] | None:
        """Return the endpoint of the server that is up now; None if none is. Starts nothing."""
        path = self.directory / "endpoint.json"
        return json.loads(path.read_text(encoding="utf-8")) if _is_locked(path) else None

    def is_kept(self) -> bool:
        return _is_locked(self.directory / "keeper.lock")

    def pin(self) -> None:
        """Keep the server up without users, until `down`. Call it inside `use`."""
        self.path("pinned").touch()

    def down(self) -> bool:
        """Unpin the server and wait until it has stopped; return False if it was not up. Raises GroundError: it is in
        use, and stops when that ends, or it does not stop."""
        (self.directory / "pinned").unlink(missing_ok=True)
        was_up, deadline = self.is_kept(), time.monotonic() + STOP_TIMEOUT_S
        while self.is_kept():
            users = self.directory / "users.lock"  # which the keeper that stops the server holds exclusively
            if not _is_locked(users) and _is_locked(users, wanted=fcntl.LOCK_EX):
                raise GroundError(
                    f"{self.title} is in use: it is no longer pinned and stops when that ends; end that run, or the "
                    "local Ray head with `fineloop ray down`"
                )
            if time.monotonic() > deadline:
                raise GroundError(f"{self.title} did not stop within {STOP_TIMEOUT_S:.0f} s: see {self.directory}")
            time.sleep(POLL_S)
        return was_up


def _is_locked(path: Path, *, wanted: int = fcntl.LOCK_SH) -> bool:
    """Whether another process holds a lock on the file that excludes this kind: for a shared one, an exclusive one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        try:
            fcntl.flock(file, wanted | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def private_folder(path: Path) -> Path:
    """Create the folder if it is missing, close it to all users but its owner, and return it: that protects everything
    in it, whatever the modes of its files, but no TCP port, whose server requires a certificate, a key or a token.
    Raises UserError: it cannot be created or written."""
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
    """Return the variables for this machine's jobs alone. Without a GPU, PyTorch's compiler is disabled, which
    bitsandbytes would load in 0.8 s in each process; a user's own setting stays."""
    compiles = "TORCHDYNAMO_DISABLE" in environment or shutil.which("nvidia-smi")
    return {"PYTHONPATH": python_path(environment)} | ({} if compiles else {"TORCHDYNAMO_DISABLE": "1"})
