"""Start a server of this machine under a guard, on the ports of last time where they are free."""

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
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, Protocol

from components.shared.errors import FineloopError, GroundError, UserError
from pipelines.local import guard

# Loopback ports: the earlier ones where they are still free, others where not.

LOOPBACK = "127.0.0.1"
NEW = range(20_000, 32_768)
"""Ports to choose from, below Linux's ephemeral ports: a connection might take one of those before the server does."""


def choose_ports(count: int, *, earlier: Sequence[int] = ()) -> list[int]:
    """`count` different ports that no process listens on now, `earlier` ones first and in their order.

    Another process may take one before its server binds it: a caller that starts a server tries again with other ports.
    """
    offset = random.randrange(len(NEW))
    # Side by side: servers that start at once then choose the same port a fifth as often as with each drawn by itself.
    new = itertools.chain(NEW[offset:], NEW[:offset], itertools.repeat(0, count))
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


# Keeps a home private to its owner on a shared machine: folder modes, and a certificate for the store.
#
# A folder that only its owner may enter protects everything in it, whatever the modes of its files. It does not protect
# TCP ports: the servers behind them require this certificate, a key or a token.

OWNER_ONLY = 0o700
UMASK = 0o077
CERTIFICATE, KEY = "grpc.crt", "grpc.key"
VALID_FOR = timedelta(days=3650)
CLOCK_SKEW = timedelta(days=1)


def private_folder(path: Path) -> Path:
    """Create the folder if it is missing, close it to all users but its owner, and return it.

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


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a new self-signed certificate and its key; whoever can read the key may use the server.

    Both ends of the connections belong to the same server and share the certificate, which names the address that they
    compare.
    """
    from cryptography import x509  # not at the top: `fineloop --help` imports this module's neighbours
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fineloop")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK))]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / CERTIFICATE, directory / KEY
    key_path.unlink(missing_ok=True)
    key_path.touch(mode=0o600)
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path


# Another process may take a port between our choice and the bind. And Ray gives its agent 15 s to come up (ray 2.60,
# raylet/node_manager.cc, WaitForDashboardAgentPorts), which a busy machine may not.
ATTEMPTS = 3
POLL_S = 0.05


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
    """Start it and wait until it answers.

    Raises:
        GroundError: it is not installed, did not answer in time, or became `unwanted` meanwhile.
    """
    what = ""
    for _ in range(ATTEMPTS):
        running = _launch(server)
        try:
            if _comes_up(running, unwanted):
                return running
            if unwanted():
                raise GroundError(f"{server.title} was not wanted any more before it answered")
        except BaseException:
            running.stop()
            raise
        what = "ended at once" if running.ended() else f"did not answer within {server.start_timeout_s:.0f} s"
        running.stop()
        _remembered(server).unlink()  # whatever was wrong, the next attempt takes other ports
    raise GroundError(f"{server.title} {what}: see the logs in {server.directory}")


def _launch(server: Server) -> Running:
    private_folder(server.directory)
    earlier = _earlier_ports(server)
    ports = choose_ports(server.num_ports, earlier=earlier)
    server.clear(set(earlier) & set(ports))  # left by one that was killed
    _remembered(server).write_text(json.dumps(ports), encoding="ascii")
    command, environment = server.command(ports)
    with (server.directory / "server.log").open("wb") as log:
        process = guard.start(
            command,
            orphan_signal=server.orphan_signal,
            environment=environment,
            directory=server.directory,
            stdout=log.fileno(),
            umask=UMASK,
        )
    return Running(server, tuple(ports), process)


def _comes_up(running: Running, unwanted: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + running.server.start_timeout_s
    while time.monotonic() < deadline and not running.ended() and not unwanted():
        if running.server.answers(running.ports):
            return True
        time.sleep(POLL_S)
    return False


def _remembered(server: Server) -> Path:
    return server.directory / "ports.json"


def _earlier_ports(server: Server) -> list[int]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [int(port) for port in json.loads(_remembered(server).read_text(encoding="ascii"))]
    return []


# Secrets of single steps. As on a cluster, only these steps get them, and no other process that is started here.
#
# Steps that train or compare may run the code of a base, a metric or a task, which must not find a key to sign with.


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of this step."""
    prefixes = _of_its_own().get(name, ())
    return {each: value for each, value in environment.items() if each.startswith(prefixes)}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the secrets of any step or tracker."""
    from components.config import track

    every = tuple(each for names in (*_of_its_own().values(), *track.SECRETS.values()) for each in names)
    return {name: value for name, value in environment.items() if not name.startswith(every)}


def _of_its_own() -> dict[str, tuple[str, ...]]:
    """Prefixes of the variables that only one step is given, by the step's name: promote signs and announces the alias,
    evaluate signs what was measured, report sends events to an OpenLineage server."""
    from components.promote import announce  # not at the top: `fineloop --help` imports this module's neighbours

    of_promote = ("FINELOOP_SIGN", *announce.secrets())
    return {"promote": of_promote, "evaluate": ("FINELOOP_EVALUATION_",), "report": ("OPENLINEAGE_",)}


# A server that several processes share, and that stops when the last of them has ended in any way.
#
# HOME/<name> has the locks, all of them flock(2), which the kernel releases when a process dies:
#
#     users.lock    held shared by every process that uses the server; the keeper stops the server when it gets it
#                   exclusively
#     keeper.lock   held by the keeper while it lives; endpoint.json is valid only then, so a stale one is ignored
#     start.lock    held for moments, so that looking for a keeper and starting one are atomic
#     pinned        a plain file; while it exists, the server stays up without users (`fineloop store up`)
#
# The keeper (keeper.py) is a detached process. It writes endpoint.json, mode 0600, and failed.txt if the server did not
# start.

ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 30.0


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

    def path(self, name: str) -> Path:
        """Return the path of a file in its directory, which is created if it is missing."""
        return private_folder(self.directory) / name

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
            with _locked(self.path("users.lock"), fcntl.LOCK_SH, wait_s=STOP_TIMEOUT_S, title=self.title):
                endpoint = self._started(arguments, environment) or self._started(arguments, environment)
                if endpoint is None:
                    raise GroundError(self._failure())
                try:
                    yield endpoint
                except FineloopError as exc:
                    if self.endpoint() is not None or isinstance(exc, UserError):
                        raise
                    ended = GroundError(f"{self.title} ended while it was in use: see the logs in {self.directory}")
                    ended.add_note(f"what failed then: {exc}")
                    for note in getattr(exc, "__notes__", []):
                        ended.add_note(note)
                    raise ended from exc
        except KeyboardInterrupt:
            if not self.pinned and self._settled_users() is None:
                self._wait_until_stopped()
            raise

    def endpoint(self) -> dict[str, Any] | None:
        """Return the endpoint of the server that is up now; None if none is. Starts nothing."""
        if not self.directory.is_dir():
            return None
        with self._keeper_lock() as free:
            return None if free is not None else self._read_endpoint()

    def in_use(self) -> list[int] | None:
        """Return the users' process ids; None if there are no users, empty if they cannot be determined (no /proc)."""
        try:
            with _locked(self.path("users.lock"), fcntl.LOCK_EX, wait_s=0.0, title=self.title):
                return None
        except GroundError:
            return self._lock_holders()

    def pin(self) -> None:
        """Keep the server up without users, until `down`. Call it inside `use`."""
        self.path("pinned").touch()

    @property
    def pinned(self) -> bool:
        """Whether the server stays up without users."""
        return (self.directory / "pinned").exists()

    def down(self, *, stop_with: str) -> bool:
        """Unpin the server and wait until it has stopped; return False if it was not up.

        Raises:
            GroundError: it is in use, and stops when that use ends (`stop_with` tells how to end it), or does not stop.
        """
        if not self.directory.is_dir():
            return False
        (self.directory / "pinned").unlink(missing_ok=True)
        if (users := self._settled_users()) is not None:
            who = f" by process {', '.join(map(str, users))}" if users else ""
            raise GroundError(
                f"{self.title} is in use{who}: it is no longer pinned and stops when that ends; {stop_with}"
            )
        return self._wait_until_stopped()

    def _wait_until_stopped(self) -> bool:
        """Wait until a server without users has stopped; return False if it was not up."""
        was_up = False
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            with self._keeper_lock() as free:
                if free is not None:
                    return was_up
            was_up = True
            time.sleep(POLL_S)
        raise GroundError(f"{self.title} did not stop within {STOP_TIMEOUT_S:.0f} s: see {self.path('keeper.log')}")

    def _settled_users(self) -> list[int] | None:
        """Return the users; if unknown, wait up to a second, since a keeper that checks or stops holds the lock too."""
        deadline = time.monotonic() + 1.0
        while (users := self.in_use()) is not None and time.monotonic() < deadline:
            if users or self.endpoint() is None:
                return users or None  # None: it is stopping, or down
            time.sleep(POLL_S)
        return users

    @contextlib.contextmanager
    def _keeper_lock(self) -> Iterator[int | None]:
        """Yield the keeper's lock, or None if a keeper holds it. Other processes cannot look for a keeper meanwhile."""
        with _locked(self.path("start.lock"), fcntl.LOCK_EX, wait_s=STOP_TIMEOUT_S, title=self.title):
            descriptor = os.open(self.path("keeper.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield None
                else:
                    yield descriptor
            finally:
                os.close(descriptor)  # a keeper that was started has its own copy, and so keeps the lock

    def _started(self, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the endpoint once the server answers; None if there was a keeper, but it was about to end."""
        with self._keeper_lock() as free:
            is_ours = free is not None
            if free is not None:
                self._start_keeper(free, arguments, environment)
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            with self._keeper_lock() as free:
                if free is not None and is_ours:
                    raise GroundError(self._failure())
                if free is not None:
                    return None
                if (found := self._read_endpoint()) is not None:
                    return found
            time.sleep(POLL_S)
        raise GroundError(
            f"{self.title} did not answer within {self.start_timeout_s:.0f} s: see {self.path('keeper.log')}"
        )

    def _start_keeper(self, lock: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        for stale in ("endpoint.json", "failed.txt"):
            self.path(stale).unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "pipelines.local.keeper", self.name, "--home", str(self.home)]
        with self.path("keeper.log").open("ab") as log:
            # It forks, and the first process ends at once, so that init adopts the keeper.
            subprocess.run(
                [*command, "--lock", str(lock), *arguments],
                pass_fds=[lock],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**without_secrets(environment), "PYTHONPATH": python_path(environment)},
                cwd=self.directory,
                start_new_session=True,
                check=False,  # a keeper that did not start has released its lock, which `_started` notices
            )

    def _read_endpoint(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.path("endpoint.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _failure(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path("failed.txt").read_text(encoding="utf-8")
        return f"{self.title} ended: see {self.path('keeper.log')}"

    def _lock_holders(self) -> list[int]:
        with contextlib.suppress(OSError):
            inode = self.path("users.lock").stat().st_ino
            # proc(5): "1: FLOCK  ADVISORY  READ 5433 08:01:7864448 0 EOF"
            locks = re.findall(r"^\d+: FLOCK\s+\w+\s+READ\s+(\d+)\s+\S+:(\d+)\s", Path("/proc/locks").read_text(), re.M)
            return sorted({int(pid) for pid, number in locks if int(number) == inode and int(pid) > 0})
        return []


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


def write_private(path: Path, text: str) -> None:
    """Replace `path` atomically by a file that only its owner can read."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600, exist_ok=False)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


@contextlib.contextmanager
def _locked(path: Path, kind: int, *, wait_s: float, title: str) -> Iterator[None]:
    """Hold a lock on `path`. Raises GroundError if it cannot be acquired within `wait_s` seconds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise GroundError(f"{title}: {path} is held by another process after {wait_s:.0f} s") from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)
