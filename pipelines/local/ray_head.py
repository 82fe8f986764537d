"""A Ray head on loopback, reached through the Jobs API with a token: `ray start --head` without optional services.

Ray listens on every interface unless its node address is 127.0.0.1. It replaces that address by the machine's own
unless a variable says that the platform has no clusters, which is set here. `ray stop` is never used, because it ends
every Ray on the machine.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.local.server import LOOPBACK, ROOT, job_environment, write_private

OBJECT_STORE_BYTES = 300_000_000
AGENT = "--dashboard-agent-listen-port"
PORT_FLAGS = (
    "--dashboard-port",
    "--port",
    AGENT,
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
RAY_DIR = "ray"
"""Ray makes this part of the temporary directory writable for all users; only the owner may enter its parent."""


@dataclass(frozen=True)
class RayHead:
    """A head whose jobs inherit this process's environment. Token, ports and logs are under `directory`, the sockets
    in a temporary directory with a short path, and its jobs' temporary files in another."""

    directory: Path
    title: ClassVar[str] = "the local Ray head"
    num_ports: ClassVar[int] = len(PORT_FLAGS) + 1
    start_timeout_s: ClassVar[float] = 180.0

    def command(self, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
        from components.config.schema import TRACKED_RUNS  # `fineloop --help` imports this module's neighbours

        *own_ports, dashboard_metrics_port = ports
        if not self._token_path.exists():
            write_private(self._token_path, secrets.token_hex(32))
        temp_dir = _short_temp_dir()
        scratch = tempfile.mkdtemp(prefix="fineloop-scratch-")
        (self.directory / "temp_dir").write_text(f"{temp_dir}\n{scratch}", encoding="utf-8")
        logs = self.directory / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.unlink(missing_ok=True)
        logs.symlink_to(temp_dir / RAY_DIR / "session_latest" / "logs")
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}"),
            "--include-dashboard=true",  # it serves the Jobs API
            *[f"{flag}={port}" for flag, port in zip(PORT_FLAGS, own_ports, strict=True)],
            "--min-worker-port=0",  # any free one: the default range would collide with a second head's
            "--max-worker-port=0",
            # Two workers, the smallest number that shows that training is distributed, must fit on any machine.
            f"--num-cpus={max(2, os.cpu_count() or 1)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            f"--temp-dir={temp_dir / RAY_DIR}",
            "--log-color=false",
        ]
        private = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")
        return command, {
            **{name: value for name, value in os.environ.items() if name not in private},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            **job_environment(os.environ),
            TRACKED_RUNS: str(self.directory.parent / "runs"),
            "TMPDIR": scratch,  # for jobs, which may be killed before they empty it
            "DASHBOARD_METRIC_PORT": str(dashboard_metrics_port),
            # Ray Train asks it for the state of actors, and cannot find it by itself beside another Ray.
            "RAY_API_SERVER_ADDRESS": self.endpoint(ports)["url"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_path),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1
            "RAY_START_HOOK": f"{__name__}.{lean.__name__}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no other node could take over
            **dict.fromkeys(("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX"), "0"),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # jobs run in this Python, however the command was started
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this node is never preempted
            "RAY_worker_niceness": "0",  # a worker's default of 15 would starve the training beside any other process
        }

    def endpoint(self, ports: Sequence[int]) -> dict[str, Any]:
        return {
            "url": f"http://{LOOPBACK}:{ports[0]}",
            "token_path": str(self._token_path),
            "store_url": store_url(os.environ),
            "store_digest": store_digest(os.environ),
        }

    def answers(self, ports: Sequence[int]) -> bool:
        """Whether its Jobs API answers, and the agent that starts the jobs. If another process took the agent's port,
        the head runs without the agent, and refuses every job."""
        agent = f"http://{LOOPBACK}:{ports[PORT_FLAGS.index(AGENT)]}/api/local_raylet_healthz"
        return _is_ok(agent) and answers(self.endpoint(ports)["url"], self._token_path.read_text(encoding="ascii"))

    def clear(self, ports: Iterable[int]) -> None:
        """Remove the temporary directories of the head and its jobs, and keep the head's logs."""
        note = self.directory / "temp_dir"
        with contextlib.suppress(FileNotFoundError):
            temp_dir, *others = map(Path, note.read_text(encoding="utf-8").splitlines())
            logs = self.directory / "logs"
            if logs.is_symlink() and logs.is_dir():
                session_logs = logs.resolve()
                logs.unlink()
                shutil.copytree(
                    session_logs, logs, ignore_dangling_symlinks=True, ignore=shutil.ignore_patterns("*.sock")
                )
            for folder in (temp_dir, *others):
                shutil.rmtree(folder, ignore_errors=True)
            note.unlink()

    @property
    def _token_path(self) -> Path:
        return self.directory / "token"


def client_environment(endpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that the Jobs API client needs to find and use the head."""
    token_path = endpoint["token_path"]
    environment = {"RAY_ADDRESS": endpoint["url"], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}
    if "RAY_AUTH_TOKEN" in os.environ:  # for another cluster; Ray would prefer it to the path
        environment["RAY_AUTH_TOKEN"] = Path(token_path).read_text(encoding="ascii")
    return environment


def lean(parameters: Any, head: bool) -> None:
    """Disable the Ray Client server and the autoscaler, which no job here uses. Ray calls this (RAY_START_HOOK)."""
    parameters.ray_client_server_port = None
    parameters.no_monitor = True


def answers(url: str, token: str | None) -> bool:
    """Whether the Jobs API at `url` answers and accepts `token`."""
    return _is_ok(f"{url.rstrip('/')}/api/jobs/", {} if token is None else {"Authorization": f"Bearer {token}"})


def _is_ok(url: str, headers: Mapping[str, str] | None = None) -> bool:
    import requests  # not at the top: it takes longer to import than all the rest of this module

    with requests.Session() as session:
        session.trust_env = False  # no proxy, and no password of a .netrc
        try:
            return bool(session.get(url, headers=headers, timeout=5).status_code == 200)
        except requests.RequestException:
            return False


def store_url(environment: Mapping[str, str]) -> str:
    """Return the address of the store that jobs inherit, for people."""
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "the AWS default"


def store_digest(environment: Mapping[str, str]) -> str:
    """Return a digest of what jobs inherit and must share with this command: the store, the credentials, the code."""
    inherited = {name: value for name, value in environment.items() if name.startswith("AWS_") and value}
    return hashlib.sha256(json.dumps([inherited, str(ROOT)], sort_keys=True).encode()).hexdigest()


def _short_temp_dir() -> Path:
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) + len(f"/fineloop-12345678/{RAY_DIR}") > LONGEST_TEMP_DIR:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="fineloop-", dir=base))
