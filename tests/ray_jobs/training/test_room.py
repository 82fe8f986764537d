"""Real Ray clusters that grow from no worker to two, one that does not, and one whose nodes are drained, come and go in
the middle of a training; of this the judge is the same training on nodes that nobody takes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from safetensors.torch import load

from components.records import runs
from tests.doubles.autoscaling import CLIENT, cluster
from tests.ray_jobs import own_cluster
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

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


@pytest.mark.full
def test_a_cluster_that_can_grow_enough_is_waited_for(growing: str) -> None:
    answer = ask(growing, 2, "growing")
    assert answer["refused"] is None
    assert answer["cpus"] == 2
    assert answer["lines"] == ["the cluster has 0 of 2 CPUs: waiting for it to grow"]


@pytest.mark.full
def test_a_cluster_that_cannot_grow_enough_is_refused_by_its_autoscalers_word(growing: str) -> None:
    answer = ask(growing, 3, "growing")
    assert "ray.num_workers asks for 3 CPUs and its autoscaler cannot add enough" in answer["refused"]


@pytest.mark.full
def test_the_most_that_a_cluster_grows_to_is_named_where_the_gcs_knows_it(growing: str) -> None:
    answer = ask(growing, 3, "growing", "reported")
    assert "ray.num_workers asks for 3 CPUs and the cluster grows to 2 at most" in answer["refused"]
    assert answer["lines"] == []


@pytest.mark.full
def test_a_cluster_that_does_not_grow_is_refused_at_once() -> None:
    with cluster(grows=False) as address:
        answer = ask(address, 1, "fixed")
    assert "ray.num_workers asks for 1 CPU and the whole cluster has 0: train on a larger cluster" in answer["refused"]
    assert answer["seconds"] < 5


NUM_WORKERS = 2
NUM_STEPS = 300


@pytest.mark.slow
def test_a_training_whose_node_is_drained_goes_on_elsewhere_and_loses_no_step(config, store, tmp_path):
    toml = own_cluster.toml_of(config, store, tmp_path, f"train.max_steps={NUM_STEPS}")
    with own_cluster.driver(NUM_WORKERS + 1) as driver:
        unbroken, broken = (
            driver.submit(own_cluster.finetuned, toml, run_id, meanwhile).result(timeout=900)
            for run_id, meanwhile in (("unbroken", None), ("broken", own_cluster.drain_one))
        )
    assert broken["meanwhile"]
    assert broken["resumed_from_step"] > unbroken["resumed_from_step"] == 0
    curve, _ = store.read(runs.run_key("broken", runs.METRICS))
    assert [r["step"] for r in map(json.loads, curve.splitlines()) if r["kind"] == "train"] == [
        *range(1, NUM_STEPS + 1)
    ]
    first, second = (
        load(store.get(store.key(f"{result['version_uri']}/adapter_model.safetensors")))
        for result in (unbroken, broken)
    )
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


ELASTIC_STEPS = 600
CHECKPOINT_EVERY = 20
SUM_NOISE = 0.03  # what bfloat16 gradients, summed in another order, may move a loss by over a few steps


def grow_and_shrink() -> list[int]:
    """A node comes once one worker trains, and goes, without notice, once two have written a checkpoint."""
    (cluster,) = own_cluster.CLUSTERS
    own_cluster.wait_for_step()
    first = len(own_cluster.workers())
    with pytest.MonkeyPatch.context() as patched:  # a node's handler of SIGTERM can be set by the main thread alone
        patched.setattr("ray._private.utils.set_sigterm_handler", lambda _: None)
        added = cluster.add_node(num_cpus=1)
    while len(own_cluster.workers()) != 2:
        time.sleep(0.1)
    own_cluster.wait_for_step(own_cluster.wait_for_step() + 2 * CHECKPOINT_EVERY)
    cluster.remove_node(added, allow_graceful=False)
    while len(own_cluster.workers()) != 1:
        time.sleep(0.1)
    return [first, 2, 1]


def trained(config_toml: str, run_id: str) -> dict[str, Any]:
    """In the driver's process."""
    from ray_jobs.training import trainer

    trainer.RESIZE_EVERY_S = 2.0
    return own_cluster.finetuned(config_toml, run_id, grow_and_shrink if run_id == "elastic" else None)


@pytest.mark.full
def test_workers_come_and_go_and_the_same_batches_are_trained_on_in_the_same_order(config, store, tmp_path):
    steps = [
        f"train.max_steps={ELASTIC_STEPS}",
        f"train.checkpoint_every_steps={CHECKPOINT_EVERY}",
        "train.micro_batch_size=4",
    ]
    toml = {
        run_id: own_cluster.toml_of(config, store, tmp_path, *steps, f"ray.num_workers={workers}", "ray.max_failures=3")
        for run_id, workers in (("one", "1"), ("elastic", "[1, 2]"))
    }
    with own_cluster.driver(1) as driver:
        found = {each: driver.submit(trained, toml[each], each).result(timeout=900) for each in toml}
    assert found["elastic"]["meanwhile"] == [1, 2, 1]
    assert found["elastic"]["steps"] == ELASTIC_STEPS
    one, elastic = (
        [r for r in map(json.loads, store.get(runs.run_key(each, runs.METRICS)).splitlines()) if r["kind"] == "train"]
        for each in toml
    )
    assert [r["step"] for r in elastic] == [*range(1, ELASTIC_STEPS + 1)]
    assert [r["tokens"] for r in elastic] == [r["tokens"] for r in one]
    differing = [i for i, (a, b) in enumerate(zip(one, elastic, strict=True)) if a["loss"] != b["loss"]]
    assert differing, "two workers sum in another order"
    first = differing[0]
    assert first % CHECKPOINT_EVERY < 3, "they go on from a checkpoint of one; a sum or two may come to the same"
    for a, b in zip(one[first : first + 8], elastic[first : first + 8], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=SUM_NOISE)
