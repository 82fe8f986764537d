"""A run that is stopped, by its workflow as Kubeflow does it and by `fineloop runs stop`, on a live cluster.

A step runs in a pod as Kubeflow gives it, which a workflow owns; where Argo is not installed its kind is made, and no
controller acts on it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.ray import RayConfig, RayJobCluster
from components.ray_cluster.submit import stop_run
from tests.cluster.kube import Kube, until
from tests.cluster.pods import STEP, pod

pytestmark = pytest.mark.cluster

STOP_S = 60.0
"""By when nothing of a stopped run may hold a processor."""
ARGO = "argoproj.io"
SLEEPS = ("python", "-c", "import time; print('be' 'gan', flush=True); time.sleep(900)")
KIND = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"workflows.{ARGO}"},
    "spec": {
        "group": ARGO,
        "scope": "Namespaced",
        "names": {"kind": "Workflow", "plural": "workflows"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                },
            }
        ],
    },
}


@pytest.fixture(scope="module")
def argo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Argo's kind of a run."""
    kube = Kube("default", [], "argo", tmp_path_factory.mktemp("argo"))
    is_missing = not kube.get("crd", f"workflows.{ARGO}")
    if is_missing:
        kube.kubectl("create", "-f", "-", body=KIND)
        kube.kubectl("wait", f"crd/workflows.{ARGO}", "--for", "condition=established", "--timeout", "60s")
    yield
    if is_missing:
        kube.kubectl("delete", "crd", f"workflows.{ARGO}")


class Step:
    """A step's pod that waits for a job, and its workflow."""

    def __init__(self, kube: Kube, image: str) -> None:
        self._kube, self.run_id = kube, f"{kube.name}-step"
        workflow = {"apiVersion": f"{ARGO}/v1alpha1", "kind": "Workflow", "metadata": {"name": kube.name}, "spec": {}}
        kube.kubectl("create", "-f", "-", body=workflow)
        uid = kube.get("workflow", kube.name)["metadata"]["uid"]
        script = Path(__file__).with_name("follow.py").read_text(encoding="utf-8")
        body = pod(self.run_id, STEP, image, "python", "-c", script, self.run_id, *kube.settings, "--", *SLEEPS)
        body["metadata"]["ownerReferences"] = [
            {"apiVersion": f"{ARGO}/v1alpha1", "kind": "Workflow", "name": kube.name, "uid": uid}
        ]
        body["spec"] |= {"serviceAccountName": "fineloop-pipeline", "automountServiceAccountToken": True}
        container = body["spec"]["containers"][0]
        container["env"] = [{"name": "KFP_POD_NAME", "value": self.run_id}, {"name": "HOME", "value": "/tmp"}]
        container["envFrom"] = [{"configMapRef": {"name": "fineloop-env"}}]
        container["resources"]["limits"]["memory"] = "1Gi"
        kube.kubectl("create", "-f", "-", body=body)
        kube.kubectl("wait", "pod", self.run_id, "--for", "condition=Ready", "--timeout", "300s")

    def says(self, words: str) -> None:
        """Wait until its log has them."""
        until(lambda: words in self._kube.kubectl("logs", self.run_id), f"the step says {words!r}")

    def stop_in_the_workflow(self) -> None:
        """As Kubeflow does."""
        patch = json.dumps({"spec": {"activeDeadlineSeconds": 0}})
        self._kube.kubectl("patch", "workflow", self._kube.name, "--type", "merge", "-p", patch)

    def lose(self) -> None:
        """Its pod, without a last second."""
        self._kube.kubectl("delete", "pod", self.run_id, "--grace-period", "0", "--force", "--ignore-not-found")

    def clean_up(self) -> None:
        """Its workflow owns all else."""
        self._kube.kubectl("delete", "workflow", self._kube.name, "--ignore-not-found")


@pytest.fixture
def step(kube: Kube, argo: None, step_image: str) -> Iterator[Step]:
    made = Step(kube, step_image)
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
    kube.kubectl("delete", "pod", step.run_id)
    assert kube.rayjob(step.run_id)["status"]["jobDeploymentStatus"] == "Running"
