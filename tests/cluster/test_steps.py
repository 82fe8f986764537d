"""A step that is taken from its run while its job goes on, on a live cluster.

There need be no Argo: the rule of infra/kubeflow is asked about the pod as Kubernetes left it, and the test starts the
next attempt, without Argo's 30 s before it.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.kube import Kube
from tests.cluster.steps import Step
from tests.infra.retries import Ended, is_run_again

pytestmark = pytest.mark.cluster

WORKS = "import time; print('be' 'gan', flush=1); time.sleep(75); print('is ' 'done', flush=1)"
WHEN = ("created RayJob", "waiting for pods", "began")
TAKE: dict[str, Callable[[Step], None]] = {
    "memory": Step.take_its_memory,
    "disk": Step.fill_its_disk,
    "node": Step.evict,
}
TAKEN = [
    *((("memory", "disk"), when) for when in WHEN),
    *((("disk", "memory"), when) for when in WHEN[1:]),
    *((("node",) * 10, when) for when in WHEN[:2]),
]
"""Five steps without memory, five that the kubelet evicts, twenty of drained nodes."""
REASONS = {"memory": "OOMKilled", "disk": 'Usage of EmptyDir volume "scratch" exceeds the limit "10Mi"', "node": ""}


@pytest.fixture
def step(kube: Kube, kind_of_runs: None, step_image: str) -> Iterator[Step]:
    made = Step(kube, step_image, "python", "-c", WORKS)
    yield made
    made.clean_up()


@pytest.mark.parametrize(("taken", "when"), TAKEN)
def test_a_step_that_is_taken_is_run_again_each_time_and_follows_its_job_to_the_end(kube, step, taken, when):
    step.says(when)
    uid = kube.rayjob(step.run_id)["metadata"]["uid"]
    for how in taken:
        TAKE[how](step)
        ended = step.ended()
        if ended.status == "Succeeded":
            break  # its job was done before it was taken
        assert REASONS[how] in ended.message, ended
        assert is_run_again(ended), ended
        assert kube.rayjob(step.run_id)["metadata"]["uid"] == uid
        step.attempt()
        step.says("following it")
    assert step.ended() == Ended("Succeeded", "0", ""), step.text
    assert "is done" in step.text
    assert kube.rayjob(step.run_id)["metadata"]["uid"] == uid
    kube.nothing_is_left(step.run_id)


def test_a_step_that_failed_by_itself_is_not_run_again(kube: Kube, step: Step) -> None:
    step.says("created RayJob")
    kube.kubectl("delete", "rayjob", kube.rayjob(step.run_id)["metadata"]["name"])
    ended = step.ended()
    assert "was stopped by someone else" in step.text
    assert not is_run_again(ended), ended
