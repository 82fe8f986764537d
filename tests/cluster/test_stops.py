"""A run that is stopped, by its workflow as Kubeflow does it and by `fineloop runs stop`, on a live cluster."""

from collections.abc import Iterator

import pytest

from components.config.ray import RayConfig, RayJobCluster
from components.ray_cluster.submit import stop_run
from tests.cluster.kube import STOP_S, Kube
from tests.cluster.steps import Step

pytestmark = pytest.mark.cluster

SLEEPS = ("python", "-c", "import time; print('be' 'gan', flush=True); time.sleep(900)")


@pytest.fixture
def step(kube: Kube, kind_of_runs: None, step_image: str) -> Iterator[Step]:
    made = Step(kube, step_image, *SLEEPS)
    yield made
    made.clean_up()


@pytest.mark.parametrize("when", ["created RayJob", "waiting for pods", "began"])
@pytest.mark.parametrize("how", ["in the workflow", "by the command"])
def test_a_stopped_run_has_no_pod_of_ray_within_a_minute(kube: Kube, step: Step, how: str, when: str) -> None:
    """The command does it alone: the step's pod is gone at that moment."""
    step.says(when)
    if how == "in the workflow":
        step.stop_in_the_workflow()
    else:
        step.lose()
        where = RayJobCluster(kind="rayjob", namespace=kube.namespace)
        assert stop_run(step.run_id, RayConfig(cluster=where)) != []
    assert kube.nothing_is_left(step.run_id) < STOP_S
    assert kube.rayjob(step.run_id) == {}


def test_a_step_that_is_drained_leaves_its_job_alone(kube: Kube, step: Step) -> None:
    step.says("began")
    kube.kubectl("delete", "pod", step.pod)
    assert kube.rayjob(step.run_id)["status"]["jobDeploymentStatus"] == "Running"
