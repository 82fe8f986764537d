"""A Ray cluster on loopback that grows by itself: Ray's own autoscaler, version 2, and its own provider of fake nodes.

ray.cluster_utils.AutoscalingCluster but for two things: that calls `ray stop --force`, which ends every Ray of the
machine, and reads an example.yaml that Ray's wheel lacks, as does the provider unless it is an external one.

Ray is imported where it is used: a process keeps the RAY_AUTH_MODE that it first imports Ray with, and every test
process imports this file.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.checks.manifests import render
from pipelines.local import guard
from pipelines.local.server import choose_ports

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
PORT_FLAGS = ("--port", "--object-manager-port", "--node-manager-port", "--ray-client-server-port")
OBJECT_STORE_BYTES = 100_000_000
CLIENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What a driver needs beside the address."""


@contextlib.contextmanager
def cluster(*, grows: bool) -> Iterator[str]:
    """The address of a head without CPUs; where it grows, two workers of one CPU each come when they are asked for."""
    with tempfile.TemporaryDirectory(prefix="fineloop-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ports = choose_ports(len(PORT_FLAGS), earlier=[])
        address = f"127.0.0.1:{ports[0]}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
        command += [f"{flag}={port}" for flag, port in zip(PORT_FLAGS, ports, strict=True)]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        environment = {**os.environ, **CLIENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"}
        if grows:
            from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

            path = Path(folder) / "autoscaling.json"
            path.write_text(json.dumps(_config(address)))
            command.append(f"--autoscaling-config={path}")
            flags = ("RAY_FAKE_CLUSTER", "RAY_enable_autoscaler_v2", "AUTOSCALER_UPDATE_INTERVAL_S")
            nodes = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
            environment |= dict.fromkeys(flags, "1") | dict.fromkeys(nodes, FAKE_HEAD_NODE_ID)
        with (Path(folder) / "head.log").open("wb") as log:
            process = guard.start(command, environment=environment, stdout=log.fileno(), directory=Path(folder))
        try:
            yield address
        finally:
            guard.stop(process)


def _config(address: str) -> dict[str, Any]:
    """What KubeRay's autoscaler makes of the shared cluster of infra/overlays/kind, its pods but processes here."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    (custom_resource,) = [each for each in render("infra/overlays/kind/raycluster") if each["kind"] == "RayCluster"]
    config = _derive_autoscaling_config_from_ray_cr(custom_resource)
    types = config["available_node_types"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    for each in types.values():
        del each["resources"]["memory"]  # this machine's is what it is
        each["resources"]["object_store_memory"] = OBJECT_STORE_BYTES
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    return config | {"provider": {**provider, "launch_multiple": True}, "head_node_type": FAKE_HEAD_NODE_TYPE}
