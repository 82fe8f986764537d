"""The whole pipeline across both images: a Ray head in the one, the steps in the other, an S3 server between them.

What a cluster would add is Kubernetes, Kubeflow's server and a network; each of those has tests of its own.
"""

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from components.registry.aliases import read_alias
from components.registry.lineage import Code
from components.registry.versions import read_lineage, resolve, verify_version
from components.store.store import Store
from pipelines.local import seaweedfs
from pipelines.local.ray_head import PORT_FLAGS, answers
from pipelines.local.server import choose_ports
from tests.infra.images.containers import LIMITS, LOCKED, podman, podman_tier
from tests.models.tiny import build_base, colour_rows
from tests.waiting import wait_until

pytestmark = podman_tier

MODEL = ["adapter.name=colours", "data.max_records=0", "model.max_length=64", "train.learning_rate=0.01"]
LENGTHS = ["train.epochs=4", "evaluate.records=40", "evaluate.max_new_tokens=8"]
VOLUMES = {"/tmp": "2g", "/tmp/ray": "2g", "/home/fineloop": "2g", "/dev/shm": "2g"}
"""Volumes of a Ray pod in the manifests."""


def on_loopback(environment: Mapping[str, str], volumes: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a container that shares this machine's loopback, and is locked for the rest.

    podman takes the environment's values from its own, so that no secret is an argument.
    """
    mounts = [f"--tmpfs={path}:rw,exec,mode=1777,size={size}" for path, size in volumes.items()]
    names = [f"--env={name}" for name in environment]
    return (*LIMITS, *LOCKED, "--network", "host", "--http-proxy=false", *mounts, *names)


@contextlib.contextmanager
def ray_head(image: str, store: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """What KubeRay starts in a pod, on loopback and free ports; gives what a step needs to reach it.

    `store` is what its jobs inherit, as from a Secret.
    """
    *ports, dashboard_metrics = choose_ports(len(PORT_FLAGS) + 1)
    token, url = secrets.token_hex(32), f"http://127.0.0.1:{ports[0]}"
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # In a pod the address is the pod's own; here it stays 127.0.0.1.
    ours = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "DASHBOARD_METRIC_PORT": str(dashboard_metrics)}
    environment = {**store, **client, **ours, "HOME": "/home/fineloop"}
    command = (
        *("ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *("--num-cpus=2", "--num-gpus=0", "--object-store-memory=300000000", "--disable-usage-stats"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *(f"{flag}={port}" for flag, port in zip(PORT_FLAGS, ports, strict=True)),
    )
    options = ("--detach", *on_loopback(environment, VOLUMES))
    container = podman("run", *options, image, *command, environment=environment).stdout.strip()
    try:
        wait_until(lambda: answers(url, token), lambda: podman("logs", container, check=False))
        assert not answers(url, None)
        yield {"RAY_ADDRESS": url, **client}
    finally:
        podman("rm", "--force", "--time", "0", container)


def test_an_adapter_is_trained_compared_and_promoted(
    step_image: str, train_image: str, s3_server: seaweedfs.Endpoint, store: Store, tmp_path: Path
) -> None:
    for path in build_base(tmp_path / "base").iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    store.put("sources/colours.jsonl", "".join(json.dumps(row) + "\n" for row in colour_rows(400)).encode())
    settings = [*MODEL, *LENGTHS, f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    settings += [f"model.base={store.uri('bases/tiny')}", f"data.source={store.uri('sources/colours.jsonl')}"]
    command = ["python", "-m", "pipelines.cli", "run", "--home", "/tmp/home", "--json", "--verbose"]
    command += [part for setting in settings for part in ("--set", setting)]
    with ray_head(train_image, s3_server.environment()) as client:
        environment = {**s3_server.environment(), **client}
        options = on_loopback(environment, {"/tmp": "1g"})
        done = podman("run", "--rm", *options, step_image, *command, environment=environment)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["decision"], answer["promoted"]) == ("promote", True), answer["reasons"]
    assert answer["metrics"]["candidate"]["loss"] < answer["metrics"]["base"]["loss"] / 2

    pointer, version = read_alias(store, "colours", "production"), resolve(store, "colours@production")
    assert (pointer.version, pointer.run_id) == (answer["version"], answer["run_id"])
    verify_version(store, version)
    lineage = read_lineage(store, version)
    assert (lineage["run_id"], lineage["training"]["world_size"]) == (answer["run_id"], 2)
    assert {"deepspeed", "ray", "torch"} < lineage["environment"]["packages"].keys()
    label = '{{index .Labels "org.opencontainers.image.revision"}}'
    revision = podman("image", "inspect", "--format", label, train_image).stdout.strip()
    assert lineage["environment"]["code"] == asdict(Code(revision.removesuffix("-dirty"), revision.endswith("-dirty")))
