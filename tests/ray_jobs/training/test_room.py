"""Room on real Ray clusters: one that grows from no worker to two, and one that does not grow."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.doubles.autoscaling import CLIENT, cluster
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.full]

JOB = """
import json, sys, time
import ray
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray._private.worker import global_worker
from components.config.ray import JobsApiCluster
from components.shared.errors import ConfigError
from ray_jobs.training import trainer
from ray_jobs.training.trainer import wait_for_room

deadline = time.monotonic() + 60
while True:
    try:
        ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
        break
    except ConnectionError:
        assert time.monotonic() < deadline
        time.sleep(0.2)
gcs = global_worker.gcs_client
if sys.argv[4] == "reported":
    group = {"name": "worker", "resources": {"CPU": 1}, "min_count": 0, "max_count": 2}
    gcs.report_cluster_config(ClusterConfig(node_group_configs=[group]).SerializeToString())
if sys.argv[3] != "fixed":
    from ray_jobs.training.trainer import _autoscaling_state
    while _autoscaling_state() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
lines, refused, began = [], None, time.monotonic()
trainer.STABLE_S = 5
try:
    wait_for_room(JobsApiCluster(), {"CPU": 1}, int(sys.argv[2]), lines.append)
except ConfigError as exc:
    refused = str(exc)
answer = {"lines": lines, "refused": refused, "seconds": time.monotonic() - began}
print(json.dumps({**answer, "cpus": ray.cluster_resources().get("CPU", 0)}))
"""


def ask(address: str, num_workers: int, kind: str, config: str = "") -> dict[str, Any]:
    """The outcome of a job of that many workers of one CPU, in a driver of its own."""
    command = [sys.executable, "-W", "ignore", "-c", JOB, address, str(num_workers), kind, config]
    done = subprocess.run(
        command, env={**os.environ, **CLIENT}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def growing() -> Iterator[str]:
    """The shared cluster of infra/overlays/kind: no worker, and two at most."""
    with cluster(grows=True) as address:
        yield address


def test_a_cluster_that_can_grow_enough_is_waited_for(growing: str) -> None:
    answer = ask(growing, 2, "growing")
    assert answer["refused"] is None
    assert answer["cpus"] == 2
    assert answer["lines"] == ["the cluster has 0 of 2 CPUs: waiting for it to grow"]


def test_a_cluster_that_cannot_grow_enough_is_refused_by_its_autoscalers_word(growing: str) -> None:
    answer = ask(growing, 3, "growing")
    assert "ray.num_workers asks for 3 CPUs and its autoscaler cannot add enough" in answer["refused"]


def test_the_most_that_a_cluster_grows_to_is_named_where_the_gcs_knows_it(growing: str) -> None:
    answer = ask(growing, 3, "growing", "reported")
    assert "ray.num_workers asks for 3 CPUs and the cluster grows to 2 at most" in answer["refused"]
    assert answer["lines"] == []


def test_a_cluster_that_does_not_grow_is_refused_at_once() -> None:
    with cluster(grows=False) as address:
        answer = ask(address, 1, "fixed")
    assert "ray.num_workers asks for 1 CPU and the whole cluster has 0: train on a larger cluster" in answer["refused"]
    assert answer["seconds"] < 5
