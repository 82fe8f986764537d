"""The manifests on a real API server and its controllers: what they take, who may do what, and what the quota holds."""

from collections.abc import Iterator

import pytest
from kubernetes import client

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.rayjob_manifest import rayjob
from components.ray_cluster.workflow import Workflow
from infra.checks.manifests import Manifest, of_kind, overlay_folders, render
from infra.checks.policies.access import NAMESPACE, RIGHTS
from tests.doubles.kubernetes.control_plane import ControlPlane, needs_control_plane, wait_until

pytestmark = needs_control_plane

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
RESOURCES = (
    *(("", core, "") for core in ("configmaps", "events", "nodes", "persistentvolumeclaims", "pods", "secrets")),
    *(("", core, "") for core in ("serviceaccounts", "services")),
    *(("", "pods", "exec"), ("", "pods", "log"), ("", "serviceaccounts", "token")),
    *(("apps", "deployments", ""), ("batch", "cronjobs", ""), ("batch", "jobs", "")),
    *(("argoproj.io", "workflows", ""), ("argoproj.io", "workflowtaskresults", "")),
    *(("kueue.x-k8s.io", "localqueues", ""), ("networking.k8s.io", "networkpolicies", "")),
    *(("ray.io", "rayclusters", ""), ("ray.io", "rayjobs", ""), ("ray.io", "rayjobs", "status")),
    ("rbac.authorization.k8s.io", "rolebindings", ""),
)
NAMED = {"secrets": "mlpipeline-minio-artifact", "configmaps": "kfp-launcher"}


def pod(name: str, **spec: object) -> Manifest:
    image = {"name": "step", "image": "registry.example/step:1"}
    body = {"containers": [image], "serviceAccountName": "fineloop-pipeline", **spec}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": body,
    }


@pytest.fixture(autouse=True)
def _cleared(control_plane: ControlPlane) -> Iterator[None]:
    """Other tests on the same control plane run an operator, which would take these jobs up."""
    yield
    control_plane.kubectl(
        "delete", "rayjobs,rayclusters,jobs,pods", "--all", "--namespace", NAMESPACE, "--grace-period=0"
    )


def wanted(found: Manifest) -> Manifest:
    """An object without what controllers write; its generation counts the changes of what was wanted."""
    by_others = ("metadata", "status", "secrets")
    return {"generation": found["metadata"].get("generation")} | {k: found[k] for k in found if k not in by_others}


@pytest.mark.parametrize("folder", overlay_folders())
def test_an_overlay_is_taken_and_a_second_time_changes_nothing(control_plane: ControlPlane, folder: str) -> None:
    first, second = ([wanted(found) for found in control_plane.apply(render(folder))] for _ in range(2))
    assert first == second


def test_a_field_of_the_wrong_type_is_refused(control_plane: ControlPlane) -> None:
    (job,) = of_kind(render("infra/overlays/kind/rayjob"), "RayJob")
    job["spec"]["backoffLimit"] = "often"
    with pytest.raises(ValueError, match="backoffLimit"):
        control_plane.apply([job])


@pytest.mark.parametrize("account", RIGHTS)
def test_an_account_may_do_what_is_written_down_and_nothing_else(control_plane: ControlPlane, account: str) -> None:
    reviews = client.AuthorizationV1Api(control_plane.api)

    def allowed(group: str, resource: str, sub: str, name: str = "") -> set[tuple[str, str]]:
        told = f"{group}/{resource}/{sub}".strip("/") + (f"={name}" if name else "")
        asked = {"namespace": NAMESPACE, "group": group, "resource": resource, "subresource": sub, "name": name}
        user = f"system:serviceaccount:{NAMESPACE}:{account}"
        bodies = {verb: {"spec": {"user": user, "resourceAttributes": {**asked, "verb": verb}}} for verb in VERBS}
        return {
            (verb, told) for verb, body in bodies.items() if reviews.create_subject_access_review(body).status.allowed
        }

    found = set().union(*(allowed(*resource) for resource in RESOURCES))
    named = set().union(*(allowed("", resource, "", name) for resource, name in NAMED.items()))
    assert found | named == RIGHTS[account]


def test_a_pod_that_says_nothing_of_its_size_counts_with_the_namespaces_defaults(control_plane: ControlPlane) -> None:
    """Kubeflow's and Argo's own containers; without the LimitRange the quota would refuse them."""
    control_plane.create([pod("sizeless")])
    found = control_plane.core.read_namespaced_pod("sizeless", NAMESPACE).spec.containers[0].resources
    assert (found.requests, found.limits) == ({"cpu": "100m", "memory": "256Mi"}, {"cpu": "1", "memory": "2Gi"})
    wait_until(lambda: quota(control_plane)["pods"] != "0", "the quota does not count the pod")
    with pytest.raises(ValueError, match=r"exceeded quota: fineloop, requested: limits\.cpu=161"):
        control_plane.create(
            [pod("giant", containers=[{"name": "x", "image": "x", "resources": {"limits": {"cpu": "161"}}}])]
        )


def quota(control_plane: ControlPlane) -> dict[str, str]:
    used: dict[str, str] = control_plane.core.read_namespaced_resource_quota("fineloop", NAMESPACE).status.used
    return used


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_no_service_of_the_namespace_can_be_published(control_plane: ControlPlane, kind: str) -> None:
    spec = {"type": kind, "ports": [{"port": 8265}], "selector": {"ray.io/node-type": "head"}}
    metadata = {"name": "dashboard", "namespace": NAMESPACE}
    with pytest.raises(ValueError, match="exceeded quota: fineloop"):
        control_plane.create([{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}])


def test_more_ray_jobs_than_the_quota_allows_are_refused(control_plane: ControlPlane) -> None:
    control_plane.kubectl("patch", "quota", "fineloop", "--patch", '{"spec": {"hard": {"count/rayjobs.ray.io": "0"}}}')
    try:
        wait_until(lambda: hard(control_plane) == "0", "the quota's controller did not take the patch up")
        with pytest.raises(ValueError, match=r"exceeded quota: fineloop, requested: count/rayjobs\.ray\.io=1"):
            control_plane.create([a_job("one-more")])
    finally:
        control_plane.apply(render("infra/overlays/kind"))


def hard(control_plane: ControlPlane) -> str:
    found = control_plane.core.read_namespaced_resource_quota("fineloop", NAMESPACE).status.hard
    return str(found["count/rayjobs.ray.io"])


def a_job(run_id: str, owner: Workflow | None = None) -> Manifest:
    ray = RayConfig.model_validate({"cluster": {"kind": "rayjob"}})
    return rayjob(ray, Job(run_id, "finetune", ("true",), 60), 1, namespace=NAMESPACE, owner=owner)


def test_a_ray_job_goes_with_what_owns_it(control_plane: ControlPlane) -> None:
    """Kubernetes' garbage collector, when Kubeflow clears a run away. A pod stands for the run, without Argo."""
    control_plane.create([pod("a-run")])
    uid = control_plane.core.read_namespaced_pod("a-run", NAMESPACE).metadata.uid
    job = a_job("owned", Workflow("a-run", uid))
    job["metadata"]["ownerReferences"][0] |= {"apiVersion": "v1", "kind": "Pod"}
    control_plane.create([job])
    jobs = client.CustomObjectsApi(control_plane.api)

    def exists() -> bool:
        found = jobs.list_namespaced_custom_object("ray.io", "v1", NAMESPACE, "rayjobs")["items"]
        return job["metadata"]["name"] in [each["metadata"]["name"] for each in found]

    assert exists()
    control_plane.core.delete_namespaced_pod("a-run", NAMESPACE, grace_period_seconds=0)
    wait_until(lambda: not exists(), "the RayJob outlived its owner")


def test_the_reapers_job_gets_its_pod(control_plane: ControlPlane) -> None:
    """What the CronJob makes is admitted: account, quota and limits."""
    (cron_job,) = of_kind(render("infra/overlays/kind"), "CronJob")
    metadata = {"name": "reap-now", "namespace": NAMESPACE}
    spec = cron_job["spec"]["jobTemplate"]["spec"]
    control_plane.create([{"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}])

    def pods() -> list[client.V1Pod]:
        selector = "job-name=reap-now"
        found: list[client.V1Pod] = control_plane.core.list_namespaced_pod(NAMESPACE, label_selector=selector).items
        return found

    wait_until(lambda: bool(pods()), "the Job has no pod")
    assert pods()[0].spec.service_account_name == "fineloop-reaper"
