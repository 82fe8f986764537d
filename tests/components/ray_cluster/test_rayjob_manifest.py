"""The RayJob as it is sent. Schemas and policies are checked in tests/infra, on what created.py there makes."""

import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from ray._private import ray_constants

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import Workflow
from components.ray_cluster.rayjob_manifest import DRAIN_S, HEAD_DRAIN_S, label_value, rayjob, rayjob_name


def job(run_id: str = "night-7", **fields: Any) -> Job:
    return Job(run_id, "finetune", ("python", "-m", "ray_jobs.finetune"), 3600, **fields)


def config(cluster: dict[str, Any] | None = None, **ray: Any) -> RayConfig:
    return RayConfig.model_validate({**ray, "cluster": {"kind": "rayjob", **(cluster or {})}})


def created(cluster: dict[str, Any] | None = None, owner: Workflow | None = None, **ray: Any) -> dict[str, Any]:
    return rayjob(config(cluster, **ray), job(kfp_run_id="kfp-1"), 2, namespace="fineloop", owner=owner)


def containers(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, container and pod of each."""
    spec = found["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]]
    for pod in (*pods, found["spec"]["submitterPodTemplate"]):
        for container in pod["spec"]["containers"]:
            yield container["name"], container, pod


def test_who_looks_finds_run_task_attempt_queue_and_kubeflow_run() -> None:
    found = created({"priority_class": "fineloop-scheduled"}, owner=Workflow("run-x7k2p", "uid"))["metadata"]
    assert found["name"] == "fineloop-night-7-finetune-2"
    assert found["labels"] == {
        "app.kubernetes.io/part-of": "fineloop",
        "fineloop.dev/run-id": "night-7",
        "fineloop.dev/task": "finetune",
        "fineloop.dev/attempt": "2",
        "kueue.x-k8s.io/queue-name": "fineloop",
        "kueue.x-k8s.io/priority-class": "fineloop-scheduled",
    }
    assert found["annotations"]["fineloop.dev/kfp-run-id"] == "kfp-1"
    # Not as the controller: the workflow of a second run of the same id becomes an owner too.
    run = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-x7k2p", "uid": "uid"}
    assert found["ownerReferences"] == [{**run, "controller": False}]


def test_without_a_queue_or_a_kubeflow_run_neither_is_named() -> None:
    found = rayjob(config({"queue": "", "priority_class": "p"}), job(), 1, namespace="fineloop")["metadata"]
    assert not [label for label in found["labels"] if label.startswith("kueue")]
    assert found["annotations"] == {"fineloop.dev/run-id": "night-7", "fineloop.dev/lifetime-s": "3600"}
    assert "ownerReferences" not in found
    assert [*created({"priority_class": ""})["metadata"]["labels"]][-1] == "kueue.x-k8s.io/queue-name"


def test_what_ray_runs_is_the_command_known_by_the_attempts_name() -> None:
    command = ("python", "-m", "ray_jobs.finetune", "--set", "adapter.name=a b")
    spec = rayjob(config(), Job("r", "finetune", command, 60), 3, namespace="fineloop")["spec"]
    assert shlex.split(spec["entrypoint"]) == [*command]
    assert spec["jobId"] == "fineloop-r-finetune-3"
    # "Exceeding submitterConfig.backoffLimit still marks the RayJob as failed even if the Ray job itself is still
    # running. The default is 2" (Ray's documentation of RayJobs)
    assert spec["submitterConfig"]["backoffLimit"] > 2
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert "serviceAccountName" not in spec["submitterPodTemplate"]["spec"]
    assert spec["metadata"] == {"fineloop_run_id": "r", "fineloop_task": "finetune", "fineloop_lifetime_s": "60"}


def test_each_setting_of_the_cluster_is_where_it_is_read() -> None:
    pods = {"image_pull_secrets": ["pull"], "service_account": "mine"}
    tolerated = {"key": "pool", "operator": "Equal", "value": "gpu"}
    spec = created({**pods, "tolerations": [tolerated]}, use_gpu=True)["spec"]["rayClusterSpec"]
    head, worker = (group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
    for pod in (head, worker):
        assert (pod["imagePullSecrets"], pod["serviceAccountName"]) == ([{"name": "pull"}], "mine")
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, tolerated]
    assert "nodeSelector" not in worker
    assert "tolerations" not in head
    plain = created()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert not {"imagePullSecrets", "tolerations", "nodeSelector"} & plain.keys()


def test_the_job_that_prepares_the_data_asks_for_pods_of_their_own_number_and_size_and_no_gpu() -> None:
    pools = {"node_selector": {"pool": "gpu"}, "tolerations": [{"key": "pool"}], "nodes": 2, "topology": "rack"}
    worker = {"cpu": 8, "memory_gib": 64, "resources": {"vpc.amazonaws.com/efa": "4"}}
    ray = config({**pools, "worker": worker}, num_workers=8, use_gpu=True, gpu="A10G").for_data()
    (workers,) = rayjob(ray, job(), 1, namespace="fineloop")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [workers[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    pod = workers["template"]["spec"]
    assert not any("topology" in key for key in workers["template"]["metadata"].get("annotations", {}))
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "16Gi"}
    assert not {"nodeSelector", "tolerations"} & pod.keys()
    assert next(each for each in pod["volumes"] if each["name"] == "shared-mem")["emptyDir"]["sizeLimit"] == "5Gi"


def test_the_job_that_evaluates_apart_has_an_account_of_its_own_and_a_label_for_its_network() -> None:
    ray, apart = config({"service_account": "trains"}), Job("r1", "evaluate", ("python",), timeout_s=60)
    for found, account in ((ray, "trains"), (ray.for_evaluation(), "fineloop-evaluator")):
        cluster = rayjob(found, apart, 1, namespace="fineloop")["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["template"]["spec"]["serviceAccountName"] == account
            assert group["template"]["metadata"]["labels"]["fineloop.dev/task"] == "evaluate"
    assert RayConfig().for_evaluation() == RayConfig()


def test_what_else_workers_ask_for_is_requested_exactly_by_them_alone() -> None:
    """Kubernetes takes hugepages and extended resources where the requests are the limits."""
    other = {"vpc.amazonaws.com/efa": "4", "hugepages-2Mi": "5Gi"}
    sizes = {name: each["resources"] for name, each, _ in containers(created({"worker": {"resources": other}}))}
    assert sizes["ray-worker"]["requests"] == sizes["ray-worker"]["limits"] == {"cpu": "4", "memory": "24Gi", **other}
    assert not other.keys() & {*sizes["ray-head"]["limits"], *sizes["ray-job-submitter"]["limits"]}


OLD_KEYS = {
    "image_pull_secrets": ["pull"],
    "pod_priority_class": "training",
    "topology": "rack",
    "labels": {"cost-centre": "nlp-7"},
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "pool", "operator": "Equal", "value": "gpu"}, {"key": "spare", "effect": "NoSchedule"}],
    "env": {"NCCL_DEBUG": "INFO"},
    "worker": {"resources": {"vpc.amazonaws.com/efa": "4"}},
}
TEMPLATES = """
[pod_template]
metadata.labels = {cost-centre = "nlp-7"}
spec.priorityClassName = "training"
spec.imagePullSecrets = [{name = "pull"}]
spec.containers = [{env = [{name = "NCCL_DEBUG", value = "INFO"}]}]

[worker_template]
metadata.annotations = {"kueue.x-k8s.io/podset-preferred-topology" = "rack"}
spec.nodeSelector = {pool = "gpu"}
spec.tolerations = [
    {key = "pool", operator = "Equal", value = "gpu"},
    {key = "spare", operator = "Exists", effect = "NoSchedule"},
]
[[worker_template.spec.containers]]
resources.requests = {"vpc.amazonaws.com/efa" = "4"}
resources.limits = {"vpc.amazonaws.com/efa" = "4"}
"""


@pytest.mark.parametrize("workers", [{}, {"use_gpu": True, "gpu": "A10G", "num_workers": 2}])
def test_the_old_keys_make_the_manifest_that_templates_make(workers, caplog: pytest.LogCaptureFixture) -> None:
    templates = tomllib.loads(TEMPLATES)
    assert created(OLD_KEYS, **workers) == created(templates, **workers)
    old, new = (config(cluster, **workers) for cluster in (OLD_KEYS, templates))
    assert (old, "read for this release only" in caplog.text) == (new, True)


def test_a_variable_or_a_table_of_a_template_takes_the_place_of_ours() -> None:
    template = {"spec": {"containers": [{"env": [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "5"}]}]}}
    for name, container, _ in containers(created({"pod_template": template})):
        drains = [each["value"] for each in container["env"] if each["name"].startswith("RAY_GRACEFUL")]
        assert drains == ([] if name == "ray-job-submitter" else ["5"])


@pytest.mark.parametrize(
    ("of", "set_there", "message"),
    [
        ("spec", {"hostNetwork": True}, r"spec\.hostNetwork: is not merged"),
        ("spec", {"serviceAccountName": "fineloop-pipeline"}, r"spec\.serviceAccountName: is not merged"),
        ("spec", {"volumes": [{"name": "node", "hostPath": {"path": "/"}}]}, r"spec\.volumes: is not merged"),
        ("spec", {"securityContext": {"runAsUser": 0}}, r"spec\.securityContext: is not merged"),
        ("spec", {"containers": [{}, {"image": "x"}]}, "at most 1 item"),
        ("container", {"securityContext": {"privileged": True}}, r"containers\.0\.securityContext: is not merged"),
        ("container", {"envFrom": [{"secretRef": {"name": "x"}}]}, r"containers\.0\.envFrom: is not merged"),
        ("container", {"command": ["sh"]}, r"containers\.0\.command: is not merged"),
        ("container", {"env": [{"name": "A", "valueFrom": {}}]}, r"containers\.0\.env\.0\.valueFrom: is not merged"),
        ("container", {"env": [{"name": "HF_TOKEN", "value": "x"}]}, "put it in Secret fineloop-s3"),
        ("container", {"resources": {"limits": {"x.io/nic": "1"}}}, "requests are not the limits"),
        ("metadata", {"labels": {"fineloop.dev/task": "x"}}, "choose a name of your own"),
        ("metadata", {"annotations": {"iam.amazonaws.com/role": "promoter"}}, "choose a name of your own"),
    ],
)
@pytest.mark.parametrize("key", ["pod_template", "worker_template"])
def test_a_template_sets_nothing_that_the_cluster_or_another_step_answers_for(key, of, set_there, message):
    template = {"spec": {"containers": [set_there]}} if of == "container" else {of: set_there}
    with pytest.raises(ValidationError, match=message):
        config({key: template})


@pytest.mark.parametrize(("required", "annotation"), [(True, "required"), (False, "preferred")])
def test_workers_are_placed_within_one_level_of_the_topology(required: bool, annotation: str) -> None:
    """By the annotation of the pod set (Kueue's documentation, "Topology Aware Scheduling"); the head lies anywhere."""
    cluster = {"topology": "cloud.provider.com/topology-rack", "topology_required": required}
    for name, _, pod in containers(created(cluster)):
        found = {key: value for key, value in pod["metadata"]["annotations"].items() if "topology" in key}
        expected = {f"kueue.x-k8s.io/podset-{annotation}-topology": "cloud.provider.com/topology-rack"}
        assert found == (expected if name == "ray-worker" else {}), name


def test_priority_cost_labels_and_certificates_are_on_every_pod() -> None:
    bundle = {"pod_priority_class": "training", "labels": {"cost-centre": "nlp-7"}, "ca_bundle": "company-ca"}
    found = created(bundle)
    assert found["metadata"]["labels"]["cost-centre"] == "nlp-7"
    for name, container, pod in containers(found):
        assert pod["metadata"]["labels"]["cost-centre"] == "nlp-7", name
        assert pod["spec"]["priorityClassName"] == "training", name
        (volume,) = (each for each in pod["spec"]["volumes"] if "configMap" in each)
        assert volume["configMap"] == {"name": "company-ca"}
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == volume["name"])
        variables = {each["name"]: each["value"] for each in container["env"]}
        for key in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            assert variables[key] == f"{mount['mountPath']}/ca.crt", name


@pytest.mark.parametrize(("memory", "head_gib", "worker_gib"), [(2, 1, 1), (8, 2, 2), (64, 16, 8)])
def test_rays_objects_fit_in_shared_memory_which_is_part_of_the_pods(memory, head_gib, worker_gib):
    spec = created({"head": {"memory_gib": memory}, "worker": {"memory_gib": memory}})["spec"]["rayClusterSpec"]
    head, (worker,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    # NCCL and data loading use a worker's too
    for group, size_gib, most in ((head, head_gib, 0.95), (worker, worker_gib, 0.6)):
        sizes = [volume["emptyDir"]["sizeLimit"] for volume in group["template"]["spec"]["volumes"]]
        assert sizes[-1] == f"{size_gib}Gi"
        assert 0 < int(group["rayStartParams"]["object-store-memory"]) <= most * size_gib * 2**30


def test_a_worker_pod_that_is_to_go_has_time_for_a_checkpoint_and_a_head_keeps_it_no_longer(monkeypatch):
    """Ray reads its variable at import, as a pod does."""
    spec = created(num_workers=2)["spec"]["rayClusterSpec"]
    pod = spec["workerGroupSpecs"][0]["template"]["spec"]
    for group, seconds in ((spec["headGroupSpec"]["template"]["spec"], HEAD_DRAIN_S), (pod, DRAIN_S)):
        for variable in group["containers"][0]["env"]:
            monkeypatch.setenv(variable["name"], variable["value"])
        assert runpy.run_path(ray_constants.__file__)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == seconds
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    assert "lifecycle" not in pod["containers"][0]
    assert pod["shareProcessNamespace"]  # else KubeRay's init container takes all of that time


@pytest.mark.parametrize(("nodes", "workers", "fewest", "most"), [(0, 4, 4, 4), (0, [2, 4], 2, 4), (2, [2, 4], 1, 2)])
def test_a_gang_has_pods_for_the_most_of_its_workers(nodes: int, workers: Any, fewest: int, most: int) -> None:
    spec = created({"nodes": nodes}, num_workers=workers)["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [most, fewest, most]
    assert spec["enableInTreeAutoscaling"] is False
    head = spec["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["dashboard-host"]) == ("0", "0.0.0.0")  # it trains nothing, and pods reach it


@pytest.mark.parametrize("spot", [True, False])
def test_gpus_are_shared_out_among_the_nodes_and_spot_nodes_put_up_with_when_asked(spot: bool) -> None:
    found = created({"nodes": 2, "worker": {"cpu": 8}, "spot": spot}, num_workers=8, use_gpu=True, gpu="A10G")
    (workers,) = found["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert workers["replicas"] == 2
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A10G"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert ("cloud.google.com/gke-spot" in {each["key"] for each in pod["tolerations"]}) is spot


def test_deadlines_lie_inside_each_other() -> None:
    jobs = [replace(job(), timeout_s=timeout_s) for timeout_s in (3600, 100, 1)]
    specs = [rayjob(config(), each, 1, namespace="fineloop")["spec"] for each in jobs]
    assert [spec["activeDeadlineSeconds"] for spec in specs] == [3540, 90, 1]  # KubeRay takes no 0
    spec = created(timeout_s=3600)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert config(timeout_s=3600).patience_s > 3600


def test_every_pod_is_confined_and_stays_where_it_is() -> None:
    """Annotations of the autoscaler (FAQ, "prevent CA from removing a node") and Karpenter (Disruption); a label
    against Istio, which Kubeflow turns on in its users' namespaces (kubeflow/dashboard, profile_controller.go)."""
    pods = list(containers(created(use_gpu=True)))
    assert {name for name, _, _ in pods} == {"ray-head", "ray-worker", "ray-job-submitter"}
    for name, container, pod in pods:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert all(each["secretRef"]["optional"] for each in container.get("envFrom", []) if "secretRef" in each), name
        security = pod["spec"]["securityContext"]
        assert (security["runAsNonRoot"], security["fsGroup"]) == (True, 100), name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["spec"]["automountServiceAccountToken"] is pod["spec"]["enableServiceLinks"] is False, name
        assert pod["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }, name
        assert pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false", name


def test_a_pod_writes_to_its_volumes_alone_and_to_each_no_more_than_it_may() -> None:
    limits = {
        name: {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod["spec"]["volumes"]}
        for name, _, pod in containers(created({"disk_gib": 300}))
    }
    assert limits == {
        "ray-head": {"tmp": "300Gi", "home": "300Gi", "shared-mem": "2Gi"},
        "ray-worker": {"tmp": "300Gi", "home": "300Gi", "shared-mem": "8Gi"},
        "ray-job-submitter": {"tmp": "1Gi", "home": "1Gi"},
    }
    for name, container, pod in containers(created()):
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}, name
        if name != "ray-job-submitter":
            assert mounted["shared-mem"] == "/dev/shm"
            assert pod["spec"]["volumes"][-1]["emptyDir"]["medium"] == "Memory"


def test_secrets_are_references_and_never_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-send-me")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "nor-me")
    found = created({"env": {"NCCL_DEBUG": "INFO"}})
    assert not re.search("do-not-send-me|nor-me", str(found))
    for name, container, _ in containers(found):
        given = [] if name == "ray-job-submitter" else ["fineloop-env", "fineloop-s3"]
        assert [next(iter(each.values()))["name"] for each in container.get("envFrom", [])] == given
    head = next(container for name, container, _ in containers(found) if name == "ray-head")
    variables = {each["name"]: each["value"] for each in head["env"]}
    assert (variables["FINELOOP_IMAGE"], variables["NCCL_DEBUG"]) == (head["image"], "INFO")
    assert found["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "fineloop-ray"}


@pytest.mark.parametrize(
    "run_id", ["3f0c1de2-9a4b-4c7d-8e5f-001122334455", "A_run.with.CAPITALS", "x" * 100, "20261125-020000-ab12"]
)
def test_a_name_fits_kuberay_and_tells_runs_apart(run_id: str) -> None:
    name = rayjob_name(job(run_id), 12)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert name.endswith("-12")
    assert name != rayjob_name(job(f"{run_id}0"), 12)
    assert name != rayjob_name(job(run_id), 1)
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", label_value(run_id))
    assert len({rayjob_name(job(run_id), 1) for run_id in ("a-run", "a.run", "a_run", "A-run")}) == 4


@pytest.mark.parametrize(
    ("ray", "message"),
    [
        ({"cluster": {"image": "fineloop/train:latest"}}, "give it a tag other than latest, or a digest"),
        ({"cluster": {"env": {"HF_TOKEN": "x"}}}, "put it in Secret fineloop-s3"),
        ({"cluster": {"env": {"HOME": "/x"}}}, "HOME is set by Fineloop"),
        ({"cluster": {"nodes": 3}, "num_workers": 4}, "make it a multiple"),
        ({"cpus_per_worker": 5}, "cluster.worker.cpu 4 is less than the 5"),
        ({"cluster": {"queue": "Not A Name"}}, "queue"),
        ({"cluster": {"worker": {"resources": {"vpc.amazonaws.com/efa": "0"}}}}, "resources"),
        ({"cluster": {"worker": {"resources": {"nvidia.com/gpu": "4"}}}}, "use_gpu and num_workers ask for"),
        ({"cluster": {"labels": {"kueue.x-k8s.io/queue-name": "mine"}}}, "choose a name of your own"),
    ],
)
def test_what_cannot_work_is_refused_before_any_cluster_is_asked(ray: dict[str, Any], message: str) -> None:
    cluster = {"kind": "rayjob", **ray.pop("cluster", {})}
    with pytest.raises(ValidationError) as caught:
        RayConfig.model_validate({**ray, "cluster": cluster})
    assert message in str(caught.value)
