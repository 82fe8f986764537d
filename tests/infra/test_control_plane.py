"""The manifests on a real API server and its controllers: what they take, who may do what, and what the quota holds."""

from collections.abc import Iterator
from itertools import product

import pytest
from kubernetes import client

from components.ray_cluster.kubernetes_api import Workflow
from infra.checks.manifests import Manifest, overlay_folders, render
from infra.checks.policies.access import NAMESPACE, RIGHTS
from tests.doubles.kubernetes.control_plane import ControlPlane, needs_control_plane
from tests.infra.created import CONFIGS, created
from tests.waiting import wait_until

pytestmark = needs_control_plane


def new(kind: str, name: str, spec: object) -> Manifest:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec}


def pod(name: str, **container: object) -> Manifest:
    image = {"name": "step", "image": "registry.example/step:1", **container}
    return new("Pod", name, {"containers": [image], "serviceAccountName": "fineloop-pipeline"})


@pytest.fixture(autouse=True)
def _cleared(control_plane: ControlPlane) -> Iterator[None]:
    """Other tests on the same control plane run an operator, which would take these jobs up."""
    yield
    control_plane.kubectl("delete", "rayjobs,rayclusters,jobs,pods", "--all", "-n", NAMESPACE, "--grace-period=0")


def wanted(found: Manifest) -> Manifest:
    """An object without what controllers write; its generation counts the changes of what was wanted."""
    by_others = ("metadata", "status", "secrets")
    return {"generation": found["metadata"].get("generation")} | {k: found[k] for k in found if k not in by_others}


@pytest.mark.parametrize("folder", overlay_folders())
def test_an_overlay_is_taken_and_a_second_time_changes_nothing(control_plane: ControlPlane, folder: str) -> None:
    first, second = ([wanted(found) for found in control_plane.apply(render(folder))] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("account", RIGHTS)
def test_an_account_may_do_what_is_written_down_and_nothing_else(control_plane: ControlPlane, account: str) -> None:
    """In the API server's own words, asked by the account itself."""
    authorization = client.AuthorizationV1Api(control_plane.client(control_plane.account(account)))
    review = authorization.create_self_subject_rules_review({"spec": {"namespace": NAMESPACE}})
    found = {
        (verb, f"{group}/{resource}{'=' * bool(name)}{name}".lstrip("/"))
        for rule in review.status.resource_rules
        for verb, group, resource in product(rule.verbs, rule.api_groups, rule.resources)
        for name in rule.resource_names or [""]
    }
    anybodys = {("create", f"authorization.k8s.io/selfsubject{what}reviews") for what in ("access", "rules")}
    assert found - anybodys == RIGHTS[account]


def test_a_pod_that_says_nothing_of_its_size_counts_with_the_namespaces_defaults(control_plane: ControlPlane) -> None:
    """Kubeflow's and Argo's own containers; without the LimitRange the quota would refuse them."""
    control_plane.create([pod("sizeless")])
    found = control_plane.core.read_namespaced_pod("sizeless", NAMESPACE).spec.containers[0].resources
    assert (found.requests, found.limits) == ({"cpu": "100m", "memory": "256Mi"}, {"cpu": "1", "memory": "2Gi"})
    quota = control_plane.core.read_namespaced_resource_quota
    wait_until(lambda: quota("fineloop", NAMESPACE).status.used["pods"] != "0", "the quota does not count the pod")
    with pytest.raises(ValueError, match=r"exceeded quota: fineloop, requested: limits\.cpu=161"):
        control_plane.create([pod("giant", resources={"limits": {"cpu": "161"}})])


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_no_service_of_the_namespace_can_be_published(control_plane: ControlPlane, kind: str) -> None:
    spec = {"type": kind, "ports": [{"port": 8265}], "selector": {"ray.io/node-type": "head"}}
    with pytest.raises(ValueError, match="exceeded quota: fineloop"):
        control_plane.create([new("Service", "dashboard", spec)])


def test_a_ray_job_goes_with_what_owns_it(control_plane: ControlPlane) -> None:
    """Kubernetes' garbage collector, when Kubeflow clears a run away. A pod stands for the run, without Argo."""
    control_plane.create([pod("a-run")])
    uid = control_plane.core.read_namespaced_pod("a-run", NAMESPACE).metadata.uid
    owned = created(CONFIGS["cpus"], owner=Workflow("a-run", uid))
    owned["metadata"]["ownerReferences"][0] |= {"apiVersion": "v1", "kind": "Pod"}
    control_plane.create([owned])
    rayjobs, asked = client.CustomObjectsApi(control_plane.api), ("ray.io", "v1", NAMESPACE, "rayjobs")
    assert rayjobs.list_namespaced_custom_object(*asked)["items"]
    control_plane.core.delete_namespaced_pod("a-run", NAMESPACE, grace_period_seconds=0)
    wait_until(lambda: not rayjobs.list_namespaced_custom_object(*asked)["items"], "the RayJob outlived its owner")
