"""How a server is started, and on which ports, with one that serves files in place of the S3 server or the Ray head."""

import json
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.shared.errors import GroundError
from pipelines.local.server import ATTEMPTS, choose_ports, start

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
