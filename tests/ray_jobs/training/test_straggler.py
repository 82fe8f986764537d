"""Who holds up a group, as two real ranks find out."""

from pathlib import Path

import pytest

from ray_jobs.training import train_loop
from tests.models.train_group import in_group


@pytest.mark.parametrize(
    ("seconds", "rank"),
    [
        ([10.0, 10.0], None),
        ([10.0, 12.0], None),
        ([10.0, 13.0], 1),
        ([13.0, 10.0, 10.2, 9.9], 0),
        ([10.0, 30.0, 30.0, 10.0, 10.0], 1),  # two: one of them is named
        ([10.0, 5.0, 10.0], None),  # who is fast holds up nobody
    ],
)
def test_the_straggler_is_who_is_slower_than_most(seconds, rank):
    assert train_loop.straggler(seconds) == rank


def paced(zero_stage: int) -> None:
    """In each rank: rank 1's clock runs twice as fast."""
    import itertools
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from ray_jobs.training.zero import Worker

    rank = dist.get_rank()
    ticks = itertools.count(0.0, 1.0 + rank)
    train_loop.time = SimpleNamespace(perf_counter=lambda: next(ticks))  # type: ignore[attr-defined]
    pace = train_loop.Pace(Worker(rank, 2, torch.device("cpu")), zero_stage=zero_stage)
    for step in range(1, 2 * train_loop.EVERY_STEPS + 1):
        with pace.forward():
            pass
        pace.compare(step)


@pytest.mark.parametrize(("zero_stage", "times"), [(2, 1), (3, 0)])
def test_a_straggler_is_named_once_where_workers_compute_by_themselves(tmp_path: Path, zero_stage: int, times: int):
    in_group(paced, zero_stage, directory=tmp_path, num_workers=2)
    said = (tmp_path / "rank-0.log").read_text()
    assert said.count("holds up the others: its forward passes took 100.0 s and theirs 50.0 s") == times
    assert said.count("worker 1 on ") == times
