"""Workers that fail alone, or for memory, or start for nothing, on a real Ray Train with real process groups."""

import asyncio
import ipaddress
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from components.config.schema import RegistryConfig, RunConfig
from components.shared.errors import ConfigError, FineloopError, JobError
from components.store.store import Store
from ray_jobs.training import trainer
from tests.ray_jobs import own_ray
from tests.waiting import wait_until

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


def where_they_listen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The addresses at which each worker accepts connections, in a group that has met and in another of gloo's."""
    import torch
    import torch.distributed as dist

    from ray_jobs.base import together

    with together.gloo_group(dist.get_world_size()) as group:
        dist.all_reduce(torch.zeros(1), group=group)
        return {"workers": together.all_gather(listening())}


def listening() -> list[str]:
    """The addresses at which this process accepts connections."""
    import psutil

    sockets = psutil.Process().net_connections(kind="inet")
    return sorted(each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN)


def compared(config: RunConfig) -> tuple[list[str], list[list[str]]]:
    """The addresses of any process of this Ray, and those of each worker."""
    import ray

    store = Store.open(config.registry)
    of_ray = ray.get(ray.remote(listening).remote())
    found = trainer.run(where_they_listen, {}, config.ray, store, run_id="r", name="ray", max_failures=0)
    return of_ray, found["workers"]


def run(function: Any, arguments: dict[str, Any], config: RunConfig) -> tuple[str, str]:
    """In a driver's process: what `trainer.run` raises."""
    store = Store.open(config.registry)
    try:
        trainer.run(function, arguments, config.ray, store, run_id="r", name="ray", max_failures=1)
    except FineloopError as exc:
        return type(exc).__name__, str(exc)
    return "nothing", ""


@pytest.fixture(scope="module")
def driver() -> Iterator[ProcessPoolExecutor]:
    with own_ray.driver(NUM_WORKERS) as pool:
        yield pool


def test_workers_of_one_machine_meet_where_no_other_user_of_it_gets_in(driver, config, store):
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    before = {*Path(tempfile.gettempdir()).glob("fineloop-group-*")}
    of_ray, workers = driver.submit(compared, config).result(timeout=600)
    assert len(workers) == NUM_WORKERS
    for addresses in workers:
        added = list((Counter(addresses) - Counter(of_ray)).elements())
        assert added, "gloo listens somewhere"
        assert all(ipaddress.ip_address(each).is_loopback for each in added), added
    assert {*Path(tempfile.gettempdir()).glob("fineloop-group-*")} <= before


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
    found, message = driver.submit(run, one_raises, {"error": error, "folder": str(tmp_path)}, config).result(
        timeout=600
    )
    assert found == kind
    assert str(error) in message
    assert len(list(tmp_path.glob("began-1-*"))) == attempts


def refused(config: RunConfig) -> None:
    """A training whose workers have started when it is refused, until the processors are free again."""
    import ray

    def free() -> float:
        return ray.available_resources().get("CPU", 0)

    with suppress(ConfigError), trainer.started(config.ray, Store.open(config.registry), "refused"):
        wait_until(lambda: free() == 0, "the workers have not started")
        raise ConfigError("no such base")
    wait_until(lambda: free() == NUM_WORKERS, "the workers still hold their processors")


def test_workers_that_started_for_a_training_that_is_refused_leave_their_processors(driver, config, store):
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    driver.submit(refused, config).result(timeout=600)


def test_gpus_that_others_could_use_do_not_wait_for_a_driver(placed, store, monkeypatch):
    run = mock.create_autospec(trainer.run, return_value={"trained": 1})
    monkeypatch.setattr(trainer, "run", run)
    monkeypatch.setattr(trainer.entry, "connect", lambda: None)
    with trainer.started(placed("ray.use_gpu=true").ray, store, "r") as work:
        run.assert_not_called()
        assert work({"spec": "1"}) == {"trained": 1}
    assert run.call_args.args[:2] == (trainer.work, {"spec": "1"})


def test_a_worker_that_is_started_again_gets_its_orders_again():
    async def taken() -> list[list[int]]:
        orders = trainer.Orders()
        waiting = asyncio.create_task(orders.take())
        await asyncio.sleep(0)
        await orders.give([1])
        return [await waiting, await orders.take()]

    assert asyncio.run(taken()) == [[1], [1]]


def waits(arguments: dict[str, Any]) -> dict[str, Any]:
    """On each worker, for what ends it."""
    import time

    time.sleep(600)
    return {}


def test_a_training_that_ray_ends_for_memory_says_so(
    config: RunConfig, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    with own_ray.driver(2) as pool:
        _, said = pool.submit(run, waits, {}, config).result(timeout=600)
    assert said.startswith("the workers failed: a node ran out of memory")
