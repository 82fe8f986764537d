"""Steps that something takes from their run, on a live cluster: Argo itself reads the rule of infra/kubeflow."""

from collections.abc import Iterator

import pytest

from components.config.config_file import load
from tests.cluster.held import Held
from tests.cluster.kube import Kube
from tests.cluster.live import ROOT, Live

pytestmark = pytest.mark.cluster

NUMBER = 5
DRAINED = {"Error: pod deleted", "Failed: main: Error (exit code 143)"}
"""By when Argo looks. A pod that is gone before Argo saw it run has a second one in the same attempt."""
OOM_KILLED = "Failed: main: OOMKilled"
EVICTED = 'Failed: Usage of EmptyDir volume "scratch" exceeds the limit "10Mi"'


@pytest.fixture
def steps(kube: Kube, live: Live, step_image: str) -> Iterator[Held]:
    config = load(ROOT / "pipelines/configs/icd10.toml", kube.settings)
    made = Held(kube, live.host, step_image, config, NUMBER)
    yield made
    made.clean_up()


@pytest.mark.parametrize("time", range(2))
def test_steps_of_drained_nodes_are_run_again_twice(steps: Held, time: int) -> None:
    """Twenty evictions in the two runs."""
    steps.evict(steps.running(NUMBER))
    steps.evict(steps.running(NUMBER))
    steps.touch("end", steps.running(NUMBER))
    assert steps.state() == "SUCCEEDED", steps.attempts()
    for *taken, last in steps.attempts():
        assert set(taken) <= DRAINED, taken
        assert last == "Succeeded: "


def test_steps_without_memory_and_steps_that_the_kubelet_evicts_are_run_again(steps: Held) -> None:
    steps.touch("memory", steps.running(NUMBER))
    steps.fill_disk(steps.running(NUMBER))
    steps.touch("end", steps.running(NUMBER))
    assert steps.state() == "SUCCEEDED", steps.attempts()
    for first, second, third in steps.attempts():
        assert first.startswith(OOM_KILLED), first
        assert second.startswith(EVICTED), second
        assert third == "Succeeded: "


def test_a_run_whose_step_is_lost_three_times_fails(steps: Held) -> None:
    """No graph around it is begun anew, with all that is in it."""
    first, *others = steps.running(NUMBER)
    steps.touch("end", others)
    steps.evict([first])
    assert steps.evict_each() == "FAILED"
    assert sorted(len(attempts) for attempts in steps.attempts()) == [1] * (NUMBER - 1) + [3]


def test_steps_that_fail_by_themselves_are_not_run_again(steps: Held) -> None:
    steps.touch("fail", steps.running(NUMBER))
    assert steps.state() == "FAILED"
    assert steps.attempts() == [["Failed: main: Error (exit code 1)"]] * NUMBER
