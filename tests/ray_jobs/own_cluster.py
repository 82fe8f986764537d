"""A Ray cluster of several nodes on this machine, in a process of its own that drives it and that it ends with."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

from components.config import config_file
from components.config.schema import RegistryConfig, RunConfig
from components.store.store import Store
from tests.models.tiny import colour_rows
from tests.ray_jobs.own_ray import ATTEMPTS

CLUSTERS: list[Any] = []
"""In the driver's process, the one that runs."""


def start(num_nodes: int) -> None:
    """A head without CPUs, and nodes of one CPU, in this process; its end is theirs."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    import ray
    from ray.cluster_utils import Cluster

    for attempt in range(ATTEMPTS):
        cluster = Cluster(shutdown_at_exit=True)
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False)
            for _ in range(num_nodes):
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


def stop() -> None:
    """Its nodes, which are processes of their own."""
    import ray

    ray.shutdown()
    CLUSTERS.pop().shutdown()


@contextmanager
def driver(num_nodes: int) -> Iterator[ProcessPoolExecutor]:
    """The process, which runs what is submitted to it."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start, initargs=(num_nodes,)) as pool:
        yield pool
        pool.submit(stop).result()


def toml_of(config: RunConfig, store: Store, folder: Path, *changes: str) -> str:
    """A training on colours; with no checkpoint by itself, and no failure allowed for, unless `changes` say so."""
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(400)))
    fixed = ["train.epochs=100", "train.evals_per_epoch=0", "ray.max_failures=0", "gate.metric=loss"]
    registry = RegistryConfig(bucket=store.bucket, prefix=store.prefix)
    settings = config_file.loads(config_file.dumps(config), [f"data.source={data}", *fixed, *changes])
    return config_file.dumps(settings.model_copy(update={"registry": registry}))


def finetuned(config_toml: str, run_id: str, meanwhile: Callable[[], Any] | None = None) -> dict[str, Any]:
    """What a training gives, and under `meanwhile` what that gives, which begins beside it in the same process."""
    from ray_jobs.finetune import run
    from ray_jobs.prepare import prepare
    from ray_jobs.training import STEP

    found: list[Any] = []
    helper = Thread(target=lambda: found.append(meanwhile() if meanwhile else None))
    helper.start()
    config = config_file.loads(config_toml)
    result, _ = run(config, run_id=run_id, dataset_uri=prepare(config, STEP))
    helper.join()
    return {**result.model_dump(), "meanwhile": found[0] if found else None}


def workers() -> list[dict[str, Any]]:
    """The training's, as Ray has them."""
    from ray._private.state import actors

    return [each for each in actors().values() if "TrainWorker" in each["ActorClassName"] and each["State"] == "ALIVE"]


def wait_for_step(first: int = 1) -> int:
    """The step that a group says, after this call, it has taken: this one or a later one."""
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    said_before = {log: log.stat().st_size for log in logs.glob("worker-*.out")}

    def said() -> Iterator[int]:
        for log in logs.glob("worker-*.out"):
            new = log.read_bytes()[said_before.get(log, 0) :]
            yield from map(int, re.findall(rb"\[finetune\] step (\d+)/", new))

    while not (taken := [step for step in said() if step >= first]):
        time.sleep(0.05)
    return max(taken)


def drain_one() -> str:
    """The node of a worker, once it trains."""
    wait_for_step()
    first: str = workers()[0]["Address"]["NodeID"]
    drain(first)
    return first


def drain(node_id: str) -> None:
    """As an autoscaler drains a spot node that goes in a minute."""
    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = int(time.time() * 1000) + 60_000
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(node_id, reason, "spot", deadline_ms)
    assert accepted, why
