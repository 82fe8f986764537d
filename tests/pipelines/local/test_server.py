"""How a server is started, on which ports, and ended, with one that serves files in place of ours; and when a Ray head
counts as up: the agent's path is that of Ray's own health check (dashboard/modules/reporter)."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import grpc
import psutil
import pytest

from components.shared.errors import GroundError
from pipelines.local import guard
from pipelines.local.ray_head import AGENT, PORT_FLAGS, RayHead
from pipelines.local.server import ATTEMPTS, choose_ports, start
from tests.doubles.http_server import serving
from tests.pipelines.local.conftest import is_alive
from tests.waiting import wait_until

FAILS = [sys.executable, "-c", "raise SystemExit('no room')"]


@dataclass(frozen=True)
class FileServer:
    """`python -m http.server`, whose first `failures` attempts end at once."""

    directory: Path
    failures: int = 0
    title: ClassVar[str] = "the file server"
    num_ports: ClassVar[int] = 1
    start_timeout_s: ClassVar[float] = 20.0
    tried: list[int] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)

    def command(self, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
        self.tried.append(ports[0])
        serves = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(ports[0])]
        return FAILS if len(self.tried) <= self.failures else serves, {}

    def answers(self, ports: Sequence[int]) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", ports[0])) == 0

    def endpoint(self, ports: Sequence[int]) -> dict[str, Any]:
        return {"url": f"http://127.0.0.1:{ports[0]}"}

    def clear(self, ports: Iterable[int]) -> None:
        self.cleared.extend(ports)


def test_a_server_gets_the_ports_of_last_time_and_what_a_killed_one_left_is_cleared_first(tmp_path: Path) -> None:
    server = FileServer(tmp_path / "made" / "here")
    first = start(server)
    assert server.answers(first.ports)
    assert not first.ended()
    first.stop()
    assert first.ended()
    assert not server.answers(first.ports)
    assert server.cleared == [*first.ports]
    again = start(server)
    again.stop()
    assert again.endpoint == first.endpoint
    assert server.cleared == [*first.ports] * 3  # after each stop, and before the second start


def test_a_server_that_does_not_come_up_is_tried_again_on_another_port(tmp_path: Path) -> None:
    server = FileServer(tmp_path, failures=1)
    running = start(server)
    running.stop()
    assert len(server.tried) == 2
    assert json.loads((tmp_path / "ports.json").read_text()) == [server.tried[1]]


def test_a_server_that_never_comes_up_says_where_its_log_is(tmp_path: Path) -> None:
    server = FileServer(tmp_path, failures=ATTEMPTS)
    with pytest.raises(GroundError, match=f"the file server ended at once: see the logs in {tmp_path}"):
        start(server)
    assert "no room" in (tmp_path / "server.log").read_text()
    assert not (tmp_path / "ports.json").exists()
    assert server.cleared == server.tried


def test_a_server_that_nobody_waits_for_any_more_is_stopped_and_not_tried_again(tmp_path: Path) -> None:
    server = FileServer(tmp_path)
    with pytest.raises(GroundError, match="not wanted any more"):
        start(server, is_unwanted=lambda: True)
    assert len(server.tried) == 1
    assert not server.answers(server.tried)


def test_ports_differ_and_earlier_ones_come_back_but_for_those_that_somebody_listens_on() -> None:
    ports = choose_ports(6)
    assert len(set(ports)) == 6
    assert choose_ports(6, earlier=ports) == ports
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[1]))
        taken.listen()
        chosen = choose_ports(6, earlier=ports)
    assert [now == before for now, before in zip(chosen, ports, strict=True)] == [True, False, *[True] * 4]


def test_new_ports_are_none_that_a_connection_may_begin_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux' default for the near end of connections begins at 32768 (its ip-sysctl, ip_local_port_range)."""
    monkeypatch.setattr("random.randrange", lambda end: end - 2)  # beyond the last one it begins again
    ports = choose_ports(4)
    assert len(set(ports)) == 4
    assert max(ports) < 32_768


# A command that ignores SIGTERM and leaves a daemon in a session of its own, as a Ray job's driver does.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
open(sys.argv[1] + f"/{os.getpid()}", "w").close()
time.sleep(600)
"""
OWNER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pipelines.local import guard
process = guard.start(sys.argv[2:], environment=dict(os.environ), directory=Path.cwd(), stdout=2)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_a_command_that_ignores_its_end_and_its_daemon_end_when_the_owner_is_killed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", STUBBORN, str(tmp_path)]
    root = str(Path(guard.__file__).parents[2])
    owner = subprocess.Popen([sys.executable, "-c", OWNER, root, *command], stdout=subprocess.PIPE, text=True)
    guard_pid = int(owner.stdout.readline())
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    processes = [psutil.Process(pid) for pid in (guard_pid, *(int(path.name) for path in tmp_path.iterdir()))]
    assert all(is_alive(process) for process in processes)
    owner.kill()
    owner.communicate()
    wait_until(lambda: not any(is_alive(process) for process in processes))


def test_stop_ends_the_command_with_sigterm_first(tmp_path):
    script = 'trap "echo asked > asked; exit 0" TERM; touch up; while :; do sleep 0.05; done'
    with (tmp_path / "log").open("wb") as log:
        process = guard.start(
            ["/bin/sh", "-c", script], environment=dict(os.environ), stdout=log.fileno(), directory=tmp_path
        )
    wait_until((tmp_path / "up").exists)
    guard.stop(process)
    assert (tmp_path / "asked").read_text() == "asked\n"
    guard.stop(process)  # harmless


@contextmanager
def answering(path: str) -> Iterator[int]:
    """The port of a server that knows this path alone."""
    with serving(lambda _verb, asked, *_: (200 if asked == path else 404, {})) as url:
        yield urlsplit(url).port


@pytest.mark.parametrize(("agent_path", "up"), [("/api/local_raylet_healthz", True), ("/of/somebody/else", False)])
def test_a_head_is_up_when_its_agent_is_which_starts_the_jobs(tmp_path: Path, agent_path: str, up: bool) -> None:
    head = RayHead(tmp_path)
    (tmp_path / "token").write_text("0" * 64)
    ports = choose_ports(head.num_ports)
    with answering("/api/jobs/") as ports[0]:
        assert not head.answers(ports)  # nobody has the agent's port yet
        with answering(agent_path) as ports[PORT_FLAGS.index(AGENT)]:
            assert head.answers(ports) == up


@pytest.mark.parametrize("flag", [AGENT, "--dashboard-port"])
def test_a_head_is_not_up_while_a_grpc_server_has_its_port(tmp_path: Path, flag: str) -> None:
    """As another head's may: it greets a request with HTTP/2's settings, which is no status line."""
    head = RayHead(tmp_path)
    (tmp_path / "token").write_text("0" * 64)
    ports = choose_ports(head.num_ports)
    other = grpc.server(futures.ThreadPoolExecutor(1))
    with answering("/api/local_raylet_healthz") as ports[PORT_FLAGS.index(AGENT)]:
        ports[PORT_FLAGS.index(flag)] = other.add_insecure_port("127.0.0.1:0")
        other.start()
        assert not head.answers(ports)
        other.stop(grace=None).wait()
