"""A Ray head on loopback, reached through the Jobs API with a token: `ray start --head` and nothing that is not needed.

Ray listens on every interface unless its node address is 127.0.0.1, and replaces that address by the machine's own
unless it is told that it is on a platform without clusters: so it is told that. `ray stop` would end every Ray of the
machine and is never used.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import GroundError
from pipelines.local import guard
from pipelines.local.ports import choose_ports
from pipelines.local.service import python_path, write_private

START_TIMEOUT_S = 60.0
ATTEMPTS = 2
OBJECT_STORE_BYTES = 300_000_000
PORT_FLAGS = (
    "--dashboard-port",
    "--port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--runtime-env-agent-port",
    "--object-manager-port",
    "--node-manager-port",
    "--ray-client-server-port",
)
# A Unix socket's path has at most 107 bytes; below the temporary directory Ray adds up to 66
# (session_2026-11-25_00-44-43_123456_4194304/sockets/plasma_store).
LONGEST_TEMP_DIR = 40


class _DidNotComeUp(GroundError):
    """Other ports may help."""


@dataclass(frozen=True)
class Head:
    """A running head; `process` guards it and everything it starts."""

    url: str
    token_path: Path
    directory: Path
    temp_dir: Path
    process: subprocess.Popen[bytes]


def start(directory: Path, *, announce: Callable[[str, Path], None] | None = None) -> Head:
    """Start a head whose jobs inherit this process's environment.

    Its token, ports and logs lie under `directory`, its sockets in a short temporary directory. `announce` is called
    with the address and the token's path of each head that is tried, before it answers.

    Raises:
        GroundError: it did not answer in time.
    """
    _clear(directory)
    for _ in range(ATTEMPTS - 1):  # another process may have taken a port between our choice and Ray's bind
        with contextlib.suppress(_DidNotComeUp):
            return _start_once(directory, announce)
    return _start_once(directory, announce)


def stop(head: Head) -> None:
    """Stop the head and everything that its jobs left; its logs move to `directory`/logs."""
    guard.stop(head.process)
    _clear(head.directory)


def client_environment(url: str, token_path: str) -> dict[str, str]:
    """What the Jobs API client needs to find and use the head at `url`."""
    environment = {"RAY_ADDRESS": url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}
    if "RAY_AUTH_TOKEN" in os.environ:  # of another cluster: Ray would prefer it to the path
        environment["RAY_AUTH_TOKEN"] = Path(token_path).read_text(encoding="ascii")
    return environment


def lean(parameters: Any, head: bool) -> None:
    """Leave out what no job here uses: the Ray Client server and the autoscaler. Ray calls this (RAY_START_HOOK)."""
    parameters.ray_client_server_port = None
    parameters.no_monitor = True


def head_environment(
    environment: Mapping[str, str], *, token_path: Path, dashboard_metrics_port: int
) -> dict[str, str]:
    """The head's environment, which its jobs inherit as a pod inherits a mounted secret."""
    inherited = {
        name: value
        for name, value in environment.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")
    }
    return {
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
        "PYTHONPATH": python_path(environment),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics_port),
        "RAY_START_HOOK": f"{__name__}.{lean.__name__}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no other node could take over
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # jobs run in this Python, however the command was started
        "RAY_worker_niceness": "0",  # a worker's 15 would starve the training beside anything else
    }


def _start_once(directory: Path, announce: Callable[[str, Path], None] | None) -> Head:
    token_path = _token(directory)
    *ports, dashboard_metrics_port = choose_ports(len(PORT_FLAGS) + 1, earlier=_earlier_ports(directory))
    (directory / "ports.json").write_text(json.dumps([*ports, dashboard_metrics_port]), encoding="ascii")
    temp_dir = _short_temp_dir()
    (directory / "temp_dir").write_text(str(temp_dir), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",  # it serves the Jobs API
        *[f"{flag}={port}" for flag, port in zip(PORT_FLAGS, ports, strict=True)],
        "--min-worker-port=0",  # any free one: the default range would collide with a second head's
        "--max-worker-port=0",
        # Two workers, the smallest number that shows that training is distributed, must fit on any machine.
        f"--num-cpus={max(2, os.cpu_count() or 1)}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        f"--temp-dir={temp_dir}",
        "--log-color=false",
    ]
    environment = head_environment(os.environ, token_path=token_path, dashboard_metrics_port=dashboard_metrics_port)
    log_path = directory / "head.log"
    with log_path.open("wb") as log:
        process = guard.start(
            command, orphan_signal=signal.SIGTERM, environment=environment, stdout=log.fileno(), directory=directory
        )
    head = Head(f"http://127.0.0.1:{ports[0]}", token_path, directory, temp_dir, process)
    try:
        if announce is not None:
            announce(head.url, token_path)
        if _answers(head):
            _link_logs(head)
            return head
    except BaseException:
        stop(head)
        raise
    ended = process.poll() is not None
    stop(head)
    (directory / "ports.json").unlink()  # whatever was wrong, the next attempt takes other ports
    what = "ended at once" if ended else f"did not answer within {START_TIMEOUT_S:.0f} s"
    raise _DidNotComeUp(f"the local Ray head {what}: see {log_path} and {directory / 'logs'}")


def _answers(head: Head) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and head.process.poll() is None:
        if answers(head.url, head.token_path.read_text(encoding="ascii")):
            return True
        time.sleep(0.05)
    return False


def answers(url: str, token: str | None) -> bool:
    """Whether the Jobs API at `url` answers and accepts `token`."""
    import urllib.error  # not at the top: it takes longer to import than all the rest of this module
    import urllib.request

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/api/jobs/", headers=headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _token(directory: Path) -> Path:
    path = directory / "token"
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path


def _short_temp_dir() -> Path:
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) + len("/fineloop-12345678") > LONGEST_TEMP_DIR:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="fineloop-", dir=base))


def _link_logs(head: Head) -> None:
    logs = head.directory / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.unlink(missing_ok=True)
    logs.symlink_to(head.temp_dir / "session_latest" / "logs")


def _clear(directory: Path) -> None:
    """Remove the temporary directory of the last head, whether it was stopped or killed, and keep its logs."""
    note = directory / "temp_dir"
    with contextlib.suppress(FileNotFoundError):
        temp_dir = Path(note.read_text(encoding="utf-8"))
        session_logs = (temp_dir / "session_latest" / "logs").resolve()
        if session_logs.is_dir():
            logs = directory / "logs"
            if logs.is_symlink():
                logs.unlink()
            shutil.rmtree(logs, ignore_errors=True)
            shutil.copytree(session_logs, logs, ignore_dangling_symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
        shutil.rmtree(temp_dir, ignore_errors=True)
        note.unlink()


def _earlier_ports(directory: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [int(port) for port in json.loads((directory / "ports.json").read_text(encoding="ascii"))]
    return []
