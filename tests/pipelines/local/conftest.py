"""Users of a home in processes of their own, and what the kernel says about the processes that they started."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import psutil
import pytest

from pipelines.local.server import ROOT, Service
from tests.waiting import PATIENCE_S, wait_until

USER = """
import json, sys
from pathlib import Path
from pipelines.local.local_services import local_services
with local_services(Path(sys.argv[1]), bucket=sys.argv[2], ray=sys.argv[3] == "ray") as environment:
    print(json.dumps(environment), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def nothing_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_")):
            monkeypatch.delenv(name)


@dataclass
class User:
    """A process that uses a home's servers until it gets a signal to end, or is killed."""

    process: Popen[str]
    environment: dict[str, str]

    def leave(self) -> None:
        self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)


class Machine:
    """One home and what runs on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.users: list[User] = []

    def begins(self, *, bucket: str = "bucket-one", ray: bool = False, **added: str) -> Popen[str]:
        """A user whose servers may not be up yet."""
        command = [sys.executable, "-c", USER, str(self.home), bucket, "ray" if ray else "no"]
        env = {**os.environ, **added}
        return Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, env=env)

    def user(self, **options: Any) -> User:
        process = self.begins(**options)
        line = process.stdout.readline()
        assert line, f"the user did not get its servers: {process.communicate()[1]}"
        user = User(process, json.loads(line))
        self.users.append(user)
        return user

    def processes(self, service: Service) -> set[psutil.Process]:
        """The keeper and all that descends from it."""
        keeper = psutil.Process(self.keeper_pid(service))
        return {keeper, *keeper.children(recursive=True)}

    def keeper_pid(self, service: Service) -> int:
        return int(service.endpoint()["keeper_pid"])

    def alive(self, processes: set[psutil.Process]) -> set[psutil.Process]:
        return {each for each in processes if is_alive(each)}

    def wait_gone(self, processes: set[psutil.Process]) -> None:
        wait_until(lambda: not self.alive(processes), lambda: self.alive(processes))

    def listeners(self, processes: set[psutil.Process]) -> dict[int, str]:
        """Listening TCP ports of the processes, and the address that each is bound to."""
        sockets = [socket for each in processes for socket in each.net_connections("tcp")]
        return {each.laddr.port: each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}

    def close(self) -> None:
        for user in self.users:
            if user.process.poll() is None:
                user.process.kill()
            user.process.communicate(timeout=PATIENCE_S)
        for name in ("ray", "store"):
            (self.home / name / "pinned").unlink(missing_ok=True)
            service = Service(name, name, self.home)
            wait_until(lambda service=service: not service.is_kept(), f"{name} still runs after its last user")


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def machine(nothing_is_configured: None, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "home")
    yield made
    made.close()
