"""A worker that fails alone, on a real Ray Train with real process groups; the others wait for it in an all_reduce."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig, RunConfig
from components.shared.errors import ConfigError, FineloopError, JobError
from components.store.store import Store
from ray_jobs.training import trainer
from tests.ray_jobs import own_ray

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_WORKERS = 2


def one_raises(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 raises what it is given, and rank 0 waits for it in a collective operation for half an hour."""
    import ray.train
    import torch
    import torch.distributed as dist

    rank = ray.train.get_context().get_world_rank()
    (Path(arguments["folder"]) / f"began-{rank}-{os.getpid()}").touch()
    if rank == 1:
        raise arguments["error"]
    dist.all_reduce(torch.zeros(1))
    return {}


def run(error: Exception, folder: Path, config: RunConfig) -> tuple[str, str]:
    """In a driver's process: what `trainer.run` raises."""
    arguments = {"error": error, "folder": str(folder)}
    store = Store.open(config.registry)
    try:
        trainer.run(one_raises, arguments, config, store, run_id="r", name="ray", max_failures=1)
    except FineloopError as exc:
        return type(exc).__name__, str(exc)
    return "nothing", ""


@pytest.fixture(scope="module")
def driver() -> Iterator[ProcessPoolExecutor]:
    with own_ray.driver(NUM_WORKERS) as pool:
        yield pool


@pytest.mark.parametrize(
    ("error", "kind", "attempts"),
    [
        (ConfigError("model.base 'org/name': the model hub refuses it"), "ConfigError", 1),
        pytest.param(JobError("no layer is there"), "JobError", 1, marks=pytest.mark.full),
        pytest.param(OSError("a disk went"), "JobError", 2, marks=pytest.mark.full),
    ],
)
def test_what_one_worker_raises_ends_all_of_them_with_its_words(driver, tmp_path, config, store, error, kind, attempts):
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    found, message = driver.submit(run, error, tmp_path, config).result(timeout=600)
    assert found == kind
    assert str(error) in message
    assert len(list(tmp_path.glob("began-1-*"))) == attempts
