"""A server that several processes share, and that stops when the last of them has ended in any way.

HOME/<name> has the locks, all of them flock(2), which the kernel releases when a process dies:

    users.lock    held shared by every process that uses the server; the keeper stops the server when it gets it
                  exclusively
    keeper.lock   held by the keeper while it lives; endpoint.json is valid only then, so a stale one is ignored
    start.lock    held for moments, so that looking for a keeper and starting one are atomic
    pinned        a plain file; while it exists, the server stays up without users (`fineloop store up`)

The keeper (keeper.py) is a detached process. It writes endpoint.json, mode 0600, and failed.txt if the server did not
start.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import FineloopError, GroundError, UserError
from pipelines.local.private import private_folder
from pipelines.local.step_secrets import without_secrets

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.05
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
