"""A node that is drained in the middle of a training: Ray's own drain, on a cluster of several nodes on this machine.

The judge is the same training on nodes that nobody takes.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from safetensors.torch import load

from components.config import config_file
from components.config.schema import RegistryConfig, RunConfig
from components.records import runs
from components.store.store import Store
from tests.models.tiny import colour_rows
from tests.ray_jobs.own_ray import ATTEMPTS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_WORKERS = 2
NUM_STEPS = 300
CLUSTERS: list[Any] = []
"""In the driver's process, the one that runs."""


def start_cluster() -> None:
    """A head without CPUs, and a node for each worker and one to spare, in this process, which they end with."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    import ray
    from ray.cluster_utils import Cluster

    for attempt in range(ATTEMPTS):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False)
            for _ in range(NUM_WORKERS + 1):
                cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            os.environ["RAY_ADDRESS"] = cluster.address
        except Exception:  # a busy machine may not start a node in the seconds that Ray gives it
            cluster.shutdown()
            if attempt == ATTEMPTS - 1:
                raise
        else:
            CLUSTERS.append(cluster)
            return


def stop_cluster() -> None:
    """Its nodes, which are processes of their own."""
    import ray

    ray.shutdown()
    CLUSTERS.pop().shutdown()


def finetuned(config_toml: str, run_id: str, *, drains: bool) -> dict[str, Any]:
    """What `finetune` gives; where it `drains`, one worker's node is drained once a step has been taken."""
    from ray_jobs.finetune import finetune

    drained: list[str] = []
    helper = Thread(target=lambda: drained.append(drain_one()))
    if drains:
        helper.start()
    result = finetune(config_file.loads(config_toml), run_id=run_id)
    if drains:
        helper.join()
    return {**result.model_dump(), "drained": drained}


def drain_one() -> str:
    """The node of a worker, once it trains: as an autoscaler drains a spot node that goes in a minute."""
    import ray
    from ray._private.state import actors
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    said_before = {log: log.stat().st_size for log in logs.glob("worker-*.out")}
    while not any(
        b"[finetune] step" in log.read_bytes()[said_before.get(log, 0) :] for log in logs.glob("worker-*.out")
    ):
        time.sleep(0.05)
    workers = [
        each for each in actors().values() if "TrainWorker" in each["ActorClassName"] and each["State"] == "ALIVE"
    ]
    first = workers[0]["Address"]["NodeID"]
    deadline_ms = int(time.time() * 1000) + 60_000
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(first, reason, "spot", deadline_ms)
    assert accepted, why
    return first


@pytest.fixture
def driver() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_cluster) as pool:
        yield pool
        pool.submit(stop_cluster).result()


@pytest.fixture
def toml(config: RunConfig, store: Store, tmp_path: Path) -> str:
    """No checkpoint by itself, and no failure allowed for."""
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(400)))
    changes = [f"data.source={data}", f"train.max_steps={NUM_STEPS}", "train.epochs=100", "train.evals_per_epoch=0"]
    registry = RegistryConfig(bucket=store.bucket, prefix=store.prefix)
    settings = config_file.loads(config_file.dumps(config), [*changes, "ray.max_failures=0", "gate.metric=loss"])
    return config_file.dumps(settings.model_copy(update={"registry": registry}))


def test_a_training_whose_node_is_drained_goes_on_elsewhere_and_loses_no_step(driver, toml, store):
    unbroken, broken = (
        driver.submit(finetuned, toml, run_id, drains=run_id == "broken").result(timeout=900)
        for run_id in ("unbroken", "broken")
    )
    assert len(broken["drained"]) == 1
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
