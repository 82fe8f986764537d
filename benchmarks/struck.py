"""A training that notes its steps, in a process that faults.py strikes at: what its driver and its workers run."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from components.shared.errors import ConfigError
from tests.ray_jobs import own_cluster, own_ray

FOLDER = "STRUCK_FOLDER"
"""Environment variable that names the folder of notes to the cluster's processes."""
REFUSAL = "model.base 'org/name': the model hub refuses it to this worker"


class Note(NamedTuple):
    """What a worker writes at the end of a step."""

    at: float
    step: int
    loss: float
    rank: int
    pid: int
    raylet: int
    node_id: str


def read(folder: Path, run_id: str) -> list[Note]:
    """The notes of all workers of a run, in the order in which their steps ended."""
    lines = [line.split() for file in folder.glob(f"{run_id}-rank-*") for line in file.read_text().splitlines()]
    return sorted(
        Note(float(at), int(step), float.fromhex(loss), *map(int, numbers), node)
        for at, step, loss, *numbers, node in lines
    )


def refusal(folder: Path, run_id: str) -> Path:
    """Once it is there, rank 1 makes a mistake of its own."""
    return folder / f"{run_id}-refused"


def train(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """In each worker: Fineloop's own training function."""
    import ray
    import ray.train

    from ray_jobs.training import job, train_loop

    context, run_id, folder = ray.train.get_context(), json.loads(arguments["spec"])["run_id"], Path(os.environ[FOLDER])
    rank, take_step = context.get_world_rank(), train_loop.take_step
    # Of a worker Ray's parent is the node's raylet.
    about = f"{rank} {os.getpid()} {os.getppid()} {ray.get_runtime_context().get_node_id()}"
    with (folder / f"{run_id}-rank-{rank}").open("a") as notes, pytest.MonkeyPatch.context() as patched:

        def noted(*args: Any, step: int, **how: Any) -> tuple[float, float, int]:
            if rank == 1 and refusal(folder, run_id).exists():
                raise ConfigError(REFUSAL)
            taken = take_step(*args, step=step, **how)
            notes.write(f"{time.time()} {step + 1} {taken[0].hex()} {about}\n")
            notes.flush()
            return taken

        patched.setattr(train_loop, "take_step", noted)
        return job.train(arguments)


def finetuned(config_toml: str, run_id: str, dataset_uri: str | None) -> dict[str, Any]:
    """In the driver."""
    from components.config import config_file
    from ray_jobs import finetune

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "train", train)
        return finetune.finetune(config_file.loads(config_toml), run_id=run_id, dataset_uri=dataset_uri).model_dump()


def main() -> None:
    """`python -m ray_jobs.finetune`, on a cluster that is there."""
    from ray_jobs import finetune

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "train", train)
        finetune.main()


def connect(address: str) -> None:
    """In the driver, which is another process than the one that starts nodes: it is busy with a training."""
    os.environ |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}


class Cluster(NamedTuple):
    """What is known of it outside of the process that started it."""

    address: str
    head: list[int]
    """Its head's processes."""


def fill(num_nodes: int, lost: Sequence[str]) -> Cluster:
    """Add nodes of one CPU until there are so many, those that are `lost` not counted."""
    import ray

    (cluster,) = own_cluster.CLUSTERS
    counted = [each for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")]
    for _ in range(num_nodes - sum(each["NodeID"] not in lost for each in counted)):
        for attempt in range(own_ray.ATTEMPTS):
            try:
                cluster.add_node(num_cpus=1)
            except Exception:  # a busy machine may not start a node in the seconds that Ray gives it
                if attempt == own_ray.ATTEMPTS - 1:
                    raise
            else:
                break
    head = cluster.head_node.all_processes.values()
    return Cluster(cluster.address, [info.process.pid for infos in head for info in infos])


if __name__ == "__main__":
    main()
