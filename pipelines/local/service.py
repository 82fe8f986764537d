"""A server that several processes share and that goes when the last of them is gone, however it went.

Under HOME/<name> lie the locks, all of them flock(2), which the kernel releases on any death:

    users.lock    held shared by every process that uses the server; the keeper stops the server when it gets it whole
    keeper.lock   held by the keeper while it lives: endpoint.json counts only then, so a stale one is ignored
    start.lock    held for moments, so that looking for a keeper and starting one is one act
    pinned        a plain file: while it is there the server stays without users (`fineloop store up`)

The keeper (keeper.py) is a detached process; it writes endpoint.json, 0600, and
failed.txt when the server did not start.
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
    """The shared server `name` of one home. `title` is what people call it."""

    name: str
    title: str
    home: Path
    start_timeout_s: float

    @property
    def directory(self) -> Path:
        """Where its locks, logs and data lie."""
        return self.home / self.name

    def path(self, name: str) -> Path:
        """The file `name` in its directory, which is made when missing."""
        return private_folder(self.directory) / name

    @contextlib.contextmanager
    def use(self, *, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Use the server, started when it is not up; it stays while this context, or another one, is open.

        Yields the endpoint once it answers. `arguments` and `environment` are the keeper's, and do nothing when one
        lives already. Ctrl-C waits until a server without other users is gone.

        Raises:
            GroundError: the server did not start; the message is the keeper's. Or something failed here because it
                ended by itself.
        """
        try:
            # A keeper that is stopping the server holds this lock whole; it takes seconds.
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
        """The endpoint of the server that is up now, None when none is. Starts nothing."""
        if not self.directory.is_dir():
            return None
        with self._keeper_lock() as free:
            return None if free is not None else self._read_endpoint()

    def in_use(self) -> list[int] | None:
        """Process ids of the users, None when there is none. Empty when they cannot be determined (no /proc)."""
        try:
            with _locked(self.path("users.lock"), fcntl.LOCK_EX, wait_s=0.0, title=self.title):
                return None
        except GroundError:
            return self._lock_holders()

    def pin(self) -> None:
        """Let the server stay without users, until `down`. Call it inside `use`."""
        self.path("pinned").touch()

    @property
    def pinned(self) -> bool:
        """Whether the server stays without users."""
        return (self.directory / "pinned").exists()

    def down(self, *, stop_with: str) -> bool:
        """Unpin the server and wait until it has stopped; False when it was not up.

        Raises:
            GroundError: it is in use (and stops when that ends; `stop_with` says how), or it does not stop.
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
        """Wait for the end of a server without users; False when it was not up."""
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
        """The users, after a moment's grace: the keeper too holds the lock when it looks or stops."""
        deadline = time.monotonic() + 1.0
        while (users := self.in_use()) is not None and time.monotonic() < deadline:
            if users or self.endpoint() is None:
                return users or None  # None: it is stopping, or down
            time.sleep(POLL_S)
        return users

    @contextlib.contextmanager
    def _keeper_lock(self) -> Iterator[int | None]:
        """The keeper's lock, None when a keeper has it. No other process looks for one at the same time."""
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
                os.close(descriptor)  # the keeper, when one was started, has its own copy and so the lock

    def _started(self, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any] | None:
        """The endpoint, once it answers. None when there was a keeper, and it was on its way out."""
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
            # It forks and the first process ends at once, so that the keeper is a child of init.
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
    """PYTHONPATH with this code's root first, so that `python -m` finds the three packages from any directory."""
    others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
    return os.pathsep.join([str(ROOT), *others])


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the processes of this machine's jobs have of their own.

    Without a GPU nothing here is compiled, and bitsandbytes would load PyTorch's compiler in each of them, which takes
    0.8 s; a user's own setting stays.
    """
    compiles = "TORCHDYNAMO_DISABLE" in environment or shutil.which("nvidia-smi")
    return {"PYTHONPATH": python_path(environment)} | ({} if compiles else {"TORCHDYNAMO_DISABLE": "1"})


def write_private(path: Path, text: str) -> None:
    """Replace `path` by a file that only its owner can read, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600, exist_ok=False)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


@contextlib.contextmanager
def _locked(path: Path, kind: int, *, wait_s: float, title: str) -> Iterator[None]:
    """Hold a lock on `path`. Raises GroundError when it is not to be had within `wait_s`."""
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
