"""When a head counts as up. The agent's path is that of Ray's own health check (dashboard/modules/reporter)."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest

from pipelines.local.ray_head import AGENT, PORT_FLAGS, RayHead
from pipelines.local.server import choose_ports
from tests.doubles.http_server import serving


@contextmanager
def answering(path: str) -> Iterator[int]:
    """The port of a server that knows this path alone."""
    with serving(lambda _verb, asked, *_: (200 if asked == path else 404, {})) as url:
        port = urlsplit(url).port
        assert port is not None
        yield port


@pytest.mark.parametrize(
    ("agent_path", "up"),
    [
        pytest.param("/api/local_raylet_healthz", True, id="the agent"),
        pytest.param("/", False, id="somebody else, who took its port"),
        pytest.param(None, False, id="nobody yet"),
    ],
)
def test_a_head_is_up_when_its_agent_is_which_starts_the_jobs(tmp_path: Path, agent_path: str | None, up: bool) -> None:
    head = RayHead(tmp_path)
    (tmp_path / "token").write_text("0" * 64)
    ports = choose_ports(head.num_ports)
    with answering("/api/jobs/") as ports[0]:
        if agent_path is None:
            assert head.answers(ports) == up
            return
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
