"""Workers that are there before their training and stay after it, in Ray Train's groups on a real Ray: whatever is
lost, nothing hangs.
"""

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.shared.errors import DataError
from ray_jobs.training import job as standby
from ray_jobs.training.job import Standby
from tests.ray_jobs import own_ray
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_WORKERS = 2
ANSWER = {"version": "v1"}
ENDING_S = 60.0


def measure(task: standby.Task) -> Any:
    """A measurement that says who has done it, or does what a test wants to happen."""
    match task["what"]:
        case "refuse":
            raise DataError("no record fits")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "last":
            time.sleep(600)
    return os.getpid(), task["records"]


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """A training that leaves a file when it begins, for each time that it was done, and when it ends."""
    import ray.train

    folder = Path(arguments["folder"])
    rank = ray.train.get_context().get_world_rank()
    if standby.is_trained(arguments["board"], rank):
        return {}
    (folder / f"began-{rank}-{os.getpid()}").touch()
    job = standby.given(arguments["board"])
    if job is None:
        (folder / f"ended-{rank}").touch()
        return {}
    assert job["answer"] == ANSWER
    (folder / f"trained-{uuid.uuid4()}").touch()
    standby.stand_by(arguments["board"], rank, ANSWER, lambda: measure)
    (folder / f"ended-{rank}").touch()
    return ANSWER


def run(board: Any, *, folder: Path, max_failures: int) -> dict[str, Any]:
    """What `trainer.run` does, without what torch needs."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = DataParallelTrainer(
        train,
        train_loop_config={"board": board, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=NUM_WORKERS),
        run_config=RunConfig(
            storage_path=str(folder), name="ray", failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    answer: dict[str, Any] = trainer.fit().return_value
    return answer


def tasks(*what: str) -> list[dict[str, Any]]:
    return [{"what": each, "records": [number]} for number, each in enumerate(what)]


def stays_and_ends(workers: Standby) -> Any:
    first, second = (workers.measure(tasks("score", "score")) for _ in range(2))
    assert first == second
    assert [records for _, records in first] == [[0], [1]]
    assert len({pid for pid, _ in first}) == NUM_WORKERS
    assert len(workers.measure(tasks("score"))) == 1  # fewer records than workers
    return first


def is_refused(workers: Standby) -> None:
    with pytest.raises(DataError, match="no record fits"):
        workers.measure(tasks("score", "refuse"))
    raise KeyError("a driver that fails while its workers wait")


def measures_once(workers: Standby) -> Any:
    return workers.measure(tasks("score", "score"))


def loses_one_that_waits(workers: Standby) -> Any:
    (pid, _), _ = workers.measure(tasks("score", "score"))
    os.kill(pid, signal.SIGKILL)
    return workers.measure(tasks("score", "score")), workers.is_there, workers.measure(tasks("score"))


def loses_one_that_measures(workers: Standby) -> Any:
    return workers.measure(tasks("last", "die")), workers.is_there


def loses_the_board(workers: Standby) -> Any:
    import ray

    ray.kill(workers._board)
    return workers.measure(tasks("score", "score")), workers.is_there


def began(folder: Path, number: int) -> list[int]:
    """The processes of so many workers, as soon as they are there."""
    wait_until(lambda: len(list(folder.glob("began-*"))) >= number)
    return [int(path.name.rpartition("-")[2]) for path in sorted(folder.glob("began-*"))]


def trains(workers: Standby, _: Path) -> None:
    assert workers.train({"answer": ANSWER}) == ANSWER


def has_nothing_to_train(_: Standby, folder: Path) -> None:
    began(folder, NUM_WORKERS)
    raise KeyError("a driver that finds a mistake in the data while its workers wait")


def loses_one_before_its_training(workers: Standby, folder: Path) -> None:
    first, _ = began(folder, NUM_WORKERS)
    os.kill(first, signal.SIGKILL)
    began(folder, 2 * NUM_WORKERS)
    trains(workers, folder)


def loses_the_board_before_its_training(workers: Standby, folder: Path) -> None:
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    began(folder, NUM_WORKERS)
    ray.kill(workers._board)
    with pytest.raises(TrainingFailedError):
        trains(workers, folder)
    raise KeyError("said, and not taken for a training that gave nothing")


def tried(
    train: Callable[[Standby, Path], None], do: Callable[[Standby], Any], folder: Path, max_failures: int
) -> dict[str, Any]:
    """In the driver's process: what came of it, how often a worker trained, and how many ended in order."""
    import ray

    found: dict[str, Any] = {}
    try:
        with Standby() as workers:
            workers.begin(partial(run, folder=folder, max_failures=max_failures), num_workers=NUM_WORKERS)
            train(workers, folder)
            found["result"] = do(workers)
    except KeyError as exc:
        found["error"] = str(exc)
    workers._thread.join(ENDING_S)
    found["over"] = not workers._thread.is_alive()
    found["trained"] = len(list(folder.glob("trained-*")))
    found["ended"] = len(list(folder.glob("ended-*")))
    # Whoever takes their place finds room: what they had is free.
    taken = ray.remote(num_cpus=NUM_WORKERS)(in_their_place).remote()
    found["room"] = bool(ray.wait([taken], timeout=ENDING_S)[0])
    return found


def in_their_place() -> None:
    """Needs all that there is."""


@pytest.fixture(scope="module")
def driver() -> Iterator[ProcessPoolExecutor]:
    with own_ray.driver(NUM_WORKERS) as pool:
        yield pool


@pytest.mark.parametrize(
    ("do", "max_failures", "result", "ended"),
    [
        pytest.param(stays_and_ends, 0, ..., 2, marks=pytest.mark.full),  # which each run on a real Ray shows
        pytest.param(is_refused, 0, None, 2, marks=pytest.mark.full),
        (loses_one_that_waits, 1, (None, False, None), 0),
        pytest.param(loses_one_that_measures, 0, (None, False), 0, marks=pytest.mark.full),
        pytest.param(loses_the_board, 0, (None, False), 2, marks=pytest.mark.full),
    ],
)
def test_what_was_trained_stands_and_workers_end(driver, tmp_path, do, max_failures, result, ended):
    found = driver.submit(tried, trains, do, tmp_path, max_failures).result(timeout=600)
    assert found["trained"] == NUM_WORKERS  # nobody trains again
    assert found["over"]
    assert found["ended"] == ended
    assert found["room"]
    assert result is ... or found.get("result") == result
    assert ("error" in found) is (do is is_refused)


@pytest.mark.parametrize(
    ("train", "trained", "ended"),
    [
        pytest.param(has_nothing_to_train, 0, NUM_WORKERS, marks=pytest.mark.full),
        pytest.param(loses_one_before_its_training, NUM_WORKERS, NUM_WORKERS, marks=pytest.mark.full),
        (loses_the_board_before_its_training, 0, 0),
    ],
)
def test_workers_that_wait_for_their_training_are_let_go_or_replaced(driver, tmp_path, train, trained, ended):
    found = driver.submit(tried, train, measures_once, tmp_path, 1).result(timeout=600)
    assert found["trained"] == trained
    assert ("error" in found) is (trained == 0)
    assert found["over"]
    assert found["ended"] == ended
    assert found["room"]
