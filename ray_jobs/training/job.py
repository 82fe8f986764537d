"""The training function for Ray Train. Its controller imports this module and waits for it, so it imports little."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from components.shared import garbage
from components.shared.errors import JobError
from ray_jobs.training import standby
from ray_jobs.training.train_job import TrainJob

if TYPE_CHECKING:
    from ray_jobs.kernels.door import Kernels
    from ray_jobs.scoring.measure import HeldBase


def train(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Ray Train's training function: runs `ray_jobs.training.worker.train` with the objects `arguments` refer to.

    With a `board` in the arguments, workers receive their job from it, once the driver has one, and then stand by.
    """
    import ray
    import ray.train

    board = arguments.get("board")
    rank = ray.train.get_context().get_world_rank()
    if board is not None and standby.is_trained(board, rank):
        return {}
    with garbage.importing():
        from ray_jobs.scoring.measure import HeldBase
        from ray_jobs.training import worker

    what = arguments if board is None else standby.given(board)
    if what is None:
        return {}
    job: TrainJob = what["job"]
    job.watch.lap("workers start")
    # Passed as references: deserialising these objects imports more than the controller needs.
    tokens = ray.get([what["train_tokens"], what["eval_tokens"]])
    if board is None:
        return worker.train(job, *tokens)
    held = HeldBase()
    answer = worker.train(job, *tokens, load=held.load)
    standby.stand_by(board, rank, answer, partial(_measuring, held, rank))
    return answer


def _measuring(held: "HeldBase", rank: int) -> standby.Measure:
    """Release what only training needs, and return the function that measures on the base held since training."""
    from ray_jobs import entry
    from ray_jobs.kernels.door import give_back
    from ray_jobs.scoring import STEP
    from ray_jobs.scoring.measure import ShardResult, measure_shard

    if rank == 0:
        entry.log_as(STEP)
    held.strip()
    give_back()

    def measure(task: standby.Task) -> "tuple[Kernels, ShardResult]":
        if held.kernels is None:
            raise JobError("a worker failed before it held a base to measure on")
        return held.kernels, measure_shard(**task, held=held, kernels=held.kernels)

    return measure
