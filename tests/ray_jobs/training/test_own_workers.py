"""A job's own cluster, whose workers are known: when they are there, and when they are not."""

from collections.abc import Callable, Iterator, Mapping

import pytest

from components.config.schema import RunConfig
from components.shared.errors import UserError, WorkersMissing
from ray_jobs.training.trainer import wait_for_own, workers_with_room

NEEDED = {"CPU": 2.0}


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], float]]:
    """What it says, and how long it waits, on a clock that only sleeping moves."""
    passed = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: passed[0])
    monkeypatch.setattr("time.sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))

    def waited(seen: Iterator[Mapping[str, float]], patience_s: float) -> tuple[list[str], float]:
        lines = list[str]()
        wait_for_own(NEEDED, lambda: next(seen), patience_s, lines.append)
        return lines, passed[0]

    return waited


def test_workers_that_are_there_are_not_waited_for(wait) -> None:
    assert wait(iter([{"CPU": 2.0}]), 60) == ([], 0)


def test_workers_that_come_back_to_a_new_head_after_its_driver_are_waited_for(wait) -> None:
    """Measured on KubeRay 1.7: a driver starts on a new head while the workers' nodes have yet to come back to it."""
    seen = [*([{}] * 100), *([{"CPU": 1.0}] * 50), {"CPU": 2.0}]
    assert wait(iter(seen), 600) == (["the cluster has 0 of 2 CPUs: waiting for its workers"], 150)


def test_workers_that_do_not_come_are_the_clusters_fault_and_not_the_users(wait) -> None:
    with pytest.raises(WorkersMissing, match=r"has 1 of 2 CPUs after 60 s") as no:
        wait(iter([{"CPU": 1.0}] * 1000), 60)
    assert not isinstance(no.value, UserError)


@pytest.mark.parametrize(("has", "counted"), [(1, 2), (3, 3), (9, 4)])
def test_elastic_workers_measure_with_as_many_as_have_room(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, has: int, counted: int
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": has * config.ray.per_worker["CPU"]})
    ray = config.ray.model_copy(update={"num_workers": [2, 4]})
    assert workers_with_room(config.model_copy(update={"ray": ray})) == counted
    assert workers_with_room(config.on(5)) == 5
