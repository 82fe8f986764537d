"""What each Ray Train worker is given. Ray Train's controller reads it too, and waits for what this imports: little."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from components.config.ray import MatmulDtype
from components.registry import lineage
from components.registry.records import Took
from components.registry.versions import Version
from components.shared import garbage
from components.shared.errors import JobError
from ray_jobs.training import standby

if TYPE_CHECKING:
    from ray_jobs.adapters.held_base import HeldBase


@dataclass
class Stopwatch:
    """What passes before the first step, one part after the other, in whichever process each of them passes."""

    began: float = field(default_factory=time.time)
    """Seconds since the epoch, which processes and machines agree on."""
    parts: list[Took] = field(default_factory=list)

    def lap(self, part: str) -> None:
        """The part that ends now."""
        passed = sum(each.seconds for each in self.parts)
        self.parts.append(Took(part=part, seconds=round(time.time() - self.began - passed, 3)))

    @property
    def began_at(self) -> str:
        """ISO 8601, in UTC."""
        return datetime.fromtimestamp(self.began, UTC).isoformat()


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs, small enough to travel to each of them."""

    config_toml: str
    run_id: str
    dataset: lineage.Dataset
    base: lineage.Base
    """The identity that the driver resolved; each worker finds the files on its own machine."""
    pad: int
    dense_base: bool = False
    """The plan has workers hold the base dense, where memory is free for it when they start."""
    start: Version | None = None
    """The version that the training goes on from; None begins afresh."""
    started: lineage.Started = lineage.NOBODY_SAID
    watch: Stopwatch = field(default_factory=Stopwatch)


def train(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The training function of Ray Train: `ray_jobs.training.worker.train`, of what `arguments` refer to.

    With a `board` among them workers are told there what to train, once the driver knows, and stand by afterwards.
    """
    import ray
    import ray.train

    board = arguments.get("board")
    rank = ray.train.get_context().get_world_rank()
    if board is not None and standby.is_trained(board, rank):
        return {}
    with garbage.importing():
        from ray_jobs.adapters.held_base import HeldBase
        from ray_jobs.training import worker

    what = arguments if board is None else standby.given(board)
    if what is None:
        return {}
    job: TrainJob = what["job"]
    job.watch.lap("workers start")
    splits = ray.get([what["train_split"], what["eval_split"]])
    if board is None:
        return worker.train(job, *splits)
    held = HeldBase()
    answer = worker.train(job, *splits, load=held.load)
    standby.stand_by(board, rank, answer, partial(_measuring, held, rank))
    return answer


def _measuring(held: "HeldBase", rank: int) -> standby.Measure:
    """How a worker measures on the base that it has trained on, once it has given back what only a training needs."""
    from ray_jobs import entry
    from ray_jobs.scoring import STEP
    from ray_jobs.scoring.measure import ShardResult, measure_shard
    from ray_jobs.training import allocator

    if rank == 0:
        entry.log_as(STEP)
    held.strip()
    allocator.give_back()

    def measure(task: standby.Task) -> tuple[MatmulDtype, ShardResult]:
        if held.matmul_dtype is None:
            raise JobError("a worker failed before it held a base to measure on")
        dtype = held.matmul_dtype
        return dtype, measure_shard(**task, held=held, matmul_dtype=dtype)

    return measure
