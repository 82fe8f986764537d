"""The training function for Ray Train. Its controller imports this module and waits for it, so it imports little."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from components.shared import garbage
from components.shared.errors import FineloopError, JobError

if TYPE_CHECKING:
    from types import TracebackType

    from ray_jobs.kernels.door import Kernels
    from ray_jobs.scoring.measure import HeldBase


# Workers that start before their training, and stay after it to measure the result on the base that they hold.
#
# Starting them and importing what they need takes as long as preparing the data, which the driver does at the same
# time. New processes for the measurement would import everything again, and read and quantise the base again, which
# takes longer than many records.
#
# Ray Train's `fit` returns when the last worker has ended, so the driver waits for it in a thread. It communicates with
# the workers through an actor, the board: the driver puts the training job there and then the measurement tasks, rank 0
# the training's result, and each worker its measurements. Losing one worker loses all of them: Ray Train ends the
# group, or starts another, which trains again, or finds the training done and ends. The driver notices in its thread,
# and measures on other processes.
#
# Ray Train's controller and the board import this module, so it imports little. What passes through the board is an
# object reference in a list, which Ray does not resolve: to do so, the board would import all model code first.

Task = Mapping[str, Any]
"""Arguments of a worker's measurement."""
Measure = Callable[[Task], Any]

POLL_S = 0.5
"""Seconds between checks whether the workers are still there, while the driver waits for them."""
ENDING_S = 10.0
"""Seconds that idle workers may take to end."""


class Board:
    """An actor through which the driver and the workers exchange tasks and results."""

    def __init__(self, num_workers: int) -> None:
        self._tasks: list[asyncio.Queue[list[Any] | None]] = [asyncio.Queue() for _ in range(num_workers)]
        self._found: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(num_workers)]
        self._job: list[Any] | None = None
        self._is_given = asyncio.Event()
        self._answer: dict[str, Any] = {}
        self._is_trained = asyncio.Event()
        self._begun: set[int] = set()

    async def give(self, job: list[Any]) -> None:
        """Called by the driver: set the training job."""
        self._job = job
        self._is_given.set()

    async def job(self) -> list[Any] | None:
        """Called by a worker: wait for the training job; None where there is nothing to train after all."""
        await self._is_given.wait()
        return self._job

    async def report(self, answer: dict[str, Any]) -> None:
        """Called by rank 0: set the training's result."""
        self._answer = answer
        self._is_trained.set()

    async def is_trained(self, rank: int) -> bool:
        """Whether the training's result is set, for a worker that replaces a lost one; False on a rank's first call."""
        began_before = rank in self._begun
        self._begun.add(rank)
        return began_before and self._is_trained.is_set()

    async def answer(self) -> dict[str, Any]:
        """Wait for the training's result."""
        await self._is_trained.wait()
        return self._answer

    async def measure(self, tasks: Sequence[list[Any]]) -> list[list[Any]]:
        """Give the first ranks one task each, and return their results."""
        for queue, task in zip(self._tasks, tasks, strict=False):
            queue.put_nowait(task)
        return [await found.get() for found, _ in zip(self._found, tasks, strict=False)]

    async def end(self) -> None:
        """Release all workers: there are no more tasks."""
        self._is_given.set()
        for queue in self._tasks:
            queue.put_nowait(None)

    async def task(self, rank: int) -> list[Any] | None:
        """Wait for a worker's next measurement; None when it may end."""
        return await self._tasks[rank].get()

    async def found(self, rank: int, result: list[Any]) -> None:
        """Called by a worker: set the result of its measurement."""
        self._found[rank].put_nowait(result)


class Standby:
    """The driver's side of the standby workers; a context manager that releases them at its end."""

    def __init__(self) -> None:
        self._board: Any = None
        self._thread = threading.Thread()
        self._outcome: dict[str, Any] | BaseException = {}

    def begin(self, run: Callable[[Any], dict[str, Any]], *, num_workers: int) -> None:
        """Start the workers with `run` in a thread; it receives the board, and returns when all workers have ended."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote(num_workers)

        def run_to_the_end() -> None:
            try:
                self._outcome = run(board)
            except BaseException as exc:  # raised again in the waiting thread
                self._outcome = exc

        self._board = board
        self._thread = threading.Thread(target=run_to_the_end, daemon=True, name="standby")
        self._thread.start()

    def train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Train `job` and return rank 0's result as soon as it is reported.

        Raises any error from starting the workers or from the training.
        """
        import ray

        self._board.give.remote([ray.put(dict(job))])
        answer: dict[str, Any] | None = self._awaited(self._board.answer.remote())
        if answer is not None:
            return answer
        self._board = None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    @property
    def is_there(self) -> bool:
        """Whether there are workers, as far as is known."""
        return self._board is not None

    def measure(self, tasks: Sequence[Task]) -> list[Any] | None:
        """Have each worker measure one task and return the results; None where there are no workers.

        Raises:
            FineloopError: as raised by the measurement.
        """
        import ray

        if self._board is None:
            return None
        results: list[Any] | None = self._awaited(self._board.measure.remote([[ray.put(task)] for task in tasks]))
        if results is None:
            self._board = None
            return None
        for result in results:
            if isinstance(result, FineloopError):
                raise result
        return results

    def end(self) -> None:
        """Release the workers; they may still be ending afterwards."""
        if self._board is not None:
            self._board.end.remote()
            self._board = None

    def __enter__(self) -> "Standby":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: "TracebackType | None"
    ) -> None:
        self.end()
        if kind is None and self._thread.is_alive():
            self._thread.join(ENDING_S)

    def _awaited(self, reference: Any) -> Any:
        """The board's answer, with its references resolved; None if the workers have ended without one."""
        import ray

        is_alive = True
        while is_alive:
            is_alive = self._thread.is_alive()  # read before the last check for an answer
            if ray.wait([reference], timeout=POLL_S)[0]:
                try:
                    found = ray.get(reference)
                    return ray.get([inner for (inner,) in found]) if isinstance(found, list) else found
                except ray.exceptions.RayError:  # the board is lost, or the object's owner: the workers end
                    self._thread.join()
                    return None
        return None


def given(board: Any) -> Mapping[str, Any] | None:
    """Wait for a worker's training job from the driver; None where there is nothing to train after all.

    Raises:
        RayError: the board is lost, and the training job with it.
    """
    import ray

    reference = ray.get(board.job.remote())
    job: Mapping[str, Any] | None = reference and ray.get(reference[0])
    return job


def is_trained(board: Any, rank: int) -> bool:
    """Whether an earlier group of workers has finished the training, so that this one has nothing to do."""
    import ray

    try:
        return bool(ray.get(board.is_trained.remote(rank)))
    except ray.exceptions.RayError:
        return False


def stand_by(board: Any, rank: int, answer: dict[str, Any], prepare: Callable[[], Measure]) -> None:
    """Report the training's result, then measure whatever the driver asks for, until it releases the worker.

    `prepare` runs while the driver gets ready.
    """
    import ray

    try:
        if rank == 0:
            ray.get(board.report.remote(answer))
        measure = prepare()
        while (task := ray.get(board.task.remote(rank))) is not None:
            found: Any
            try:
                found = measure(ray.get(task[0]))
            except FineloopError as exc:
                found = exc
            ray.get(board.found.remote(rank, [ray.put(found)]))
    except ray.exceptions.RayError:
        return  # without the board there is no driver to serve; returning reports the training's result


def train(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Ray Train's training function: runs `ray_jobs.training.worker.train` with the objects `arguments` refer to.

    With a `board` in the arguments, workers receive their job from it, once the driver has one, and then stand by.
    """
    import ray
    import ray.train

    board = arguments.get("board")
    rank = ray.train.get_context().get_world_rank()
    if board is not None and is_trained(board, rank):
        return {}
    with garbage.importing():
        from ray_jobs.scoring.measure import HeldBase
        from ray_jobs.training import worker
        from ray_jobs.training.spec import TrainSpec

    what = arguments if board is None else given(board)
    if what is None:
        return {}
    stopwatch = what["stopwatch"]
    stopwatch.lap("workers start")
    spec = TrainSpec.model_validate_json(what["spec"])
    # Passed as references: deserialising these objects imports more than the controller needs.
    tokens = tuple(ray.get([what["train_tokens"], what["eval_tokens"]]))
    if board is None:
        return worker.train(spec, tokens, stopwatch)
    held = HeldBase()
    answer = worker.train(spec, tokens, stopwatch, load=held.load)
    stand_by(board, rank, answer, partial(_measuring, held, rank))
    return answer


def _measuring(held: "HeldBase", rank: int) -> Measure:
    """Release what only training needs, and return the function that measures on the base held since training."""
    from ray_jobs import entry
    from ray_jobs.kernels.door import give_back
    from ray_jobs.scoring import STEP
    from ray_jobs.scoring.measure import ShardResult, measure_shard

    if rank == 0:
        entry.log_as(STEP)
    held.strip()
    give_back()

    def measure(task: Task) -> "tuple[Kernels, ShardResult]":
        if held.kernels is None:
            raise JobError("a worker failed before it held a base to measure on")
        return held.kernels, measure_shard(**task, held=held, kernels=held.kernels)

    return measure
