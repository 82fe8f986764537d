"""A Ray head in a container of the train image: what KubeRay starts in a pod, but on loopback and free ports."""

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping

from pipelines.local.ports import choose_ports
from pipelines.local.ray_head import PORT_FLAGS, answers
from tests.infra.images.containers import on_loopback, podman, running

START_TIMEOUT_S = 120.0
SCRATCH = {"/tmp": "2g", "/tmp/ray": "2g", "/home/fineloop": "2g", "/dev/shm": "2g"}
"""The volumes of a Ray pod in the manifests, /dev/shm included."""


@contextlib.contextmanager
def ray_head(image: str, store: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """What a step needs to reach it. `store` is what its jobs inherit, as from a Secret."""
    *ports, dashboard_metrics = choose_ports(len(PORT_FLAGS) + 1)
    token, url = secrets.token_hex(32), f"http://127.0.0.1:{ports[0]}"
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment = {
        **store,
        **client,
        "HOME": "/home/fineloop",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1; in a pod the address is the pod's own
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
    }
    command = (
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *("--num-cpus=2", "--num-gpus=0", "--object-store-memory=300000000", "--disable-usage-stats"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *(f"{flag}={port}" for flag, port in zip(PORT_FLAGS, ports, strict=True)),
    )
    options = on_loopback(environment, scratch=SCRATCH)
    with running(image, *command, options=options, environment=environment) as container:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(url, token):
            if time.monotonic() > deadline or not _is_up(container):
                log = podman("logs", container, check=False)
                raise AssertionError(f"the Ray head did not start:\n{log.stdout[-4000:]}{log.stderr[-4000:]}")
            time.sleep(0.2)
        assert not answers(url, None)
        yield {"RAY_ADDRESS": url, **client}


def _is_up(container: str) -> bool:
    return podman("inspect", "--format", "{{.State.Running}}", container).stdout.strip() == "true"
