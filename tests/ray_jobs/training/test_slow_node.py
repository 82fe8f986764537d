"""A node that is slow to fetch the base must not end the others, and one that holds them up is named."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from components.config import config_file
from ray_jobs.base import base_model
from ray_jobs.training import step_zero, train_loop
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group
from tests.ray_jobs.training.in_store import in_store

STEP_S, FETCH_S = 15.0, 20.0


def fit_with_a_slow_node(config_toml: str, meeting: str) -> int:
    """Rank 1 fetches the base, and rank 0 reads it for the first check, longer than a collective may take."""
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # until all have met: who leaves before that ends the others' meeting
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", timeout=timedelta(seconds=STEP_S), rank=rank, world_size=num_workers
    )
    resolve, probe, calls = base_model.resolve, step_zero.probe, []

    def slowly(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if rank == 1 and len(calls) == 2:  # the first is the test's own
            time.sleep(FETCH_S)
        return resolve(*given, **more)

    def reading(*given: Any) -> Any:
        if rank == 0:
            time.sleep(FETCH_S)
        return probe(*given)

    with mock.patch.object(base_model, "resolve", slowly), mock.patch.object(step_zero, "probe", reading):
        return fit_in_rank(config_file.loads(config_toml), colour_rows(32), run_id="slow").trained.progress.step


def test_workers_wait_for_the_one_that_fetches_the_base_last(config, store, tmp_path: Path):
    toml = config_file.dumps(in_store(config, store, "train.epochs=1"))
    steps = in_group(fit_with_a_slow_node, toml, str(tmp_path / "meeting"), directory=tmp_path, num_workers=2)
    assert steps[0] == steps[1] > 0


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
    with mock.patch.object(train_loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks))):
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
