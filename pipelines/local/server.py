"""Start a server of this machine under a guard, on the ports of last time where they are free."""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from components.shared.errors import GroundError
from pipelines.local import guard
from pipelines.local.ports import choose_ports
from pipelines.local.private import UMASK, private_folder

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
