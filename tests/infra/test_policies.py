"""Each policy holds for every overlay, and sees what breaks it; people run them before they apply one."""

import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.ray_cluster.rayjob_manifest import rayjob
from infra.checks import check
from infra.checks.check import PLACEHOLDERS, POLICIES, Policy, placeholders, policies_of, violations
from infra.checks.manifests import INFRA, OBSERVABILITY, OVERLAYS, PROFILE, TRACKER, Manifest, render_overlay
from infra.checks.pods import pods as every_pod
from infra.checks.policies import access, pods, ray
from infra.checks.schemas import VARIABLE
from tests.infra.changes import CONTAINER, REAPER, REMOVED, WORKER, WORKERS, changed
from tests.infra.created import CONFIGS, JOB, created
from tests.infra.runbook import after, commands

LABELS = "RayJob metadata labels"
QUOTA = "ResourceQuota spec hard"
GROUP = "RayCluster spec workerGroupSpecs 0"
HEAD = "RayJob spec rayClusterSpec headGroupSpec"
SHARED_HEAD = "RayCluster spec headGroupSpec template spec"
ROLE_OF = "ServiceAccount={} metadata annotations " + access.ROLE_ARN
GPU_OPERATORS = {"nvidia.com/gpu.present": "true"}
PROMOTER = "arn:aws:iam::000000000000:role/fineloop-000000000000-pipeline"
EVALUATOR = "arn:aws:iam::000000000000:role/fineloop-000000000000-evaluator"
LINES = [*product(OVERLAYS, ("", OBSERVABILITY, TRACKER)), ("gpu", PROFILE), ("aws", PROFILE), ("team", "")]
"""A laptop's Kubeflow serves one namespace."""
BREAKS: list[tuple[Policy, str, Any]] = [
    (pods.volumes_spare_the_node, f"{WORKER} volumes +", {"name": "docker", "hostPath": {"path": "/var/run"}}),
    (pods.volumes_spare_the_node, f"{WORKER} volumes 0 emptyDir", {}),
    (pods.no_pod_takes_a_sidecar, f"{REAPER} metadata labels sidecar.istio.io/inject", "true"),
    (pods.memory_volumes_fit_in_memory, f"{WORKER} volumes 2 emptyDir sizeLimit", "48Gi"),
    (pods.ray_asks_for_what_it_takes, f"{CONTAINER} resources limits memory", "64Gi"),
    (pods.nothing_secret_is_written_down, "ConfigMap kind", "Secret"),
    (pods.nothing_secret_is_written_down, "RayJob spec entrypoint", "python x AKIA" + "A1B2" * 4),
    (pods.nothing_secret_is_written_down, f"{CONTAINER} env +", {"name": "HF_TOKEN", "value": "anything"}),
    (pods.nothing_secret_is_written_down, "ConfigMap data AWS_SECRET_ACCESS_KEY", "anything"),
    (pods.what_pods_refer_to_exists, f"{WORKER} serviceAccountName", REMOVED),
    (pods.what_pods_refer_to_exists, f"{WORKER} priorityClassName", "urgent"),
    (pods.what_pods_refer_to_exists, f"{CONTAINER} envFrom 1 secretRef name", "fineloop-s4"),
    (pods.what_pods_refer_to_exists, f"{WORKER} volumes +", {"name": "x", "secret": {"secretName": "x"}}),
    (pods.what_pods_refer_to_exists, f"{WORKER} volumes +", {"name": "x", "persistentVolumeClaim": {"claimName": "x"}}),
    (pods.images_have_a_digest, f"{CONTAINER} image", "registry.invalid/fineloop/train:tag"),
    (ray.kuberay_takes_the_jobs, "RayJob spec submissionMode", "HttpMode"),
    (ray.kuberay_takes_the_jobs, "RayJob spec deletionStrategy", {"deletionRules": []}),
    (ray.kuberay_takes_the_jobs, "RayJob spec shutdownAfterJobFinishes", False),
    (ray.kuberay_takes_the_jobs, "RayJob spec activeDeadlineSeconds", 0),
    (ray.kuberay_takes_the_jobs, "RayJob spec backoffLimit", -1),
    (ray.kuberay_takes_the_jobs, "RayJob spec runtimeEnvYAML", "pip: ["),
    (ray.kuberay_takes_the_clusters, "RayJob metadata name", "a" * 48),
    (ray.kuberay_takes_the_clusters, "RayCluster metadata name", "1-cluster"),
    (ray.kuberay_takes_the_clusters, "RayCluster spec workerGroupSpecs", lambda groups: groups * 2),
    (ray.kuberay_takes_the_clusters, f"{HEAD} template spec containers", []),
    (ray.kuberay_takes_the_clusters, f"{GROUP} replicas", 3),
    (ray.kuberay_takes_the_clusters, "RayCluster spec autoscalerOptions version", "v1"),
    (ray.kuberay_takes_the_clusters, f"{GROUP} template spec restartPolicy", "Always"),
    (ray.no_pod_of_kuberays_own_is_refused, "RayJob spec submitterPodTemplate", REMOVED),
    (ray.no_pod_of_kuberays_own_is_refused, "RayJob spec submissionMode", "SidecarMode"),
    (ray.kueue_takes_the_jobs, f"{LABELS} {ray.QUEUE}", REMOVED),
    (ray.kueue_takes_the_jobs, f"{LABELS} {ray.PRIORITY}", "fineloop-ad-hoc"),
    (ray.kueue_takes_the_jobs, "RayJob spec shutdownAfterJobFinishes", False),
    (ray.kueue_takes_the_jobs, "RayJob spec clusterSelector", {"ray.io/cluster": "fineloop-experiments"}),
    (ray.kueue_takes_the_jobs, "RayJob spec rayClusterSpec enableInTreeAutoscaling", True),
    (ray.jobs_are_gangs, f"{WORKERS} minReplicas", 1),
    (ray.jobs_are_gangs, f"{HEAD} rayStartParams num-cpus", REMOVED),
    (ray.jobs_end, "RayJob spec activeDeadlineSeconds", REMOVED),
    (ray.jobs_fit_in_the_queue, f"{WORKERS} replicas", 9),
    (ray.jobs_fit_in_the_queue, f"{QUOTA} requests.nvidia.com/gpu", "7"),
    (ray.flavors_ask_for_no_label_of_the_gpu_operator, "ResourceFlavor spec nodeLabels", GPU_OPERATORS),
    (ray.clusters_ask_for_a_token, "RayJob spec rayClusterSpec authOptions mode", "disabled"),
    (ray.no_job_has_a_kubernetes_token, f"{SHARED_HEAD} automountServiceAccountToken", True),
    (ray.no_job_has_a_kubernetes_token, f"{SHARED_HEAD} automountServiceAccountToken", REMOVED),
    (ray.no_job_has_a_kubernetes_token, f"{SHARED_HEAD} containers 0 volumeMounts +", {"name": "kubernetes-api"}),
    (ray.no_job_has_a_kubernetes_token, f"{SHARED_HEAD} shareProcessNamespace", True),
    (ray.no_job_has_a_kubernetes_token, f"{GROUP} template spec automountServiceAccountToken", True),
    (ray.no_job_has_a_kubernetes_token, f"{WORKER} automountServiceAccountToken", True),
    (ray.versions_agree, "RayCluster spec rayVersion", "2.59.0"),
    (ray.versions_agree, f"{CONTAINER} image", f"registry.invalid/fineloop/train:0.0.9@sha256:{'1' * 64}"),
    (access.accounts_have_their_rights_and_no_other, "Role=fineloop-pipeline rules 1 resources +", "pods/exec"),
    (access.accounts_have_their_rights_and_no_other, "Role=fineloop-kubeflow-run rules 2 resourceNames", REMOVED),
    (access.people_read_no_secret, "Role=fineloop-reader rules 0 resources +", "secrets"),
    (access.people_read_no_secret, "Role=fineloop-submitter rules 0 resources +", "pods/exec"),
    (access.people_read_no_secret, "Role=fineloop-submitter rules 0 resources +", "pods"),
    (access.rights_end_at_the_namespace, "Role=fineloop-reaper rules 0 verbs", ["*"]),
    (access.rights_end_at_the_namespace, "Role=fineloop-reaper kind", "ClusterRole"),
    (access.rights_end_at_the_namespace, "RoleBinding subjects 0 namespace", "default"),
    (access.everything_is_in_the_namespace, "LimitRange metadata namespace", REMOVED),
    (access.the_namespace_is_restricted, "Namespace metadata labels pod-security.kubernetes.io/enforce", "baseline"),
    (access.the_namespace_is_restricted, "LimitRange kind", "Nothing"),
    (access.the_quota_closes_the_ways_out, f"{QUOTA} services.loadbalancers", REMOVED),
    (access.services_stay_inside, "ConfigMap kind", "Ingress"),
    (access.promoting_takes_another_role_than_training, ROLE_OF.format("fineloop-trainer"), PROMOTER),
    (access.promoting_takes_another_role_than_training, ROLE_OF.format("fineloop-experiments"), PROMOTER),
    (access.promoting_takes_another_role_than_training, ROLE_OF.format("fineloop-evaluator"), PROMOTER),
    (access.promoting_takes_another_role_than_training, ROLE_OF.format("fineloop-trainer"), EVALUATOR),
]


@pytest.mark.parametrize(("overlay", "line"), LINES)
def test_the_overlay_keeps_every_policy(overlay: str, line: str) -> None:
    """Also with a line of it, which is a comment until a cluster has the kinds or the Kubeflow for it."""
    manifests = render_overlay(overlay, line)
    text = (INFRA / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8")
    assert not line or text.count(line) == text.count(f"\n  # {line}  # with") == 1
    assert (manifests != render_overlay(overlay)) == bool(line)
    assert list(violations(manifests, policies_of(overlay))) == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_job_that_fineloop_creates_keeps_every_policy(config: dict[str, Any]) -> None:
    assert list(violations(beside("aws", created(config)), policies_of("aws"))) == []


def test_the_runbooks_first_run_fits_the_laptops_queue() -> None:
    (submit,) = (command for command in commands("fineloop", "submit") if "-c" in command)
    overrides = [value for flag, value in pairwise(submit) if flag == "--set"]
    job = rayjob(config_file.load(Path(after(submit, "-c")), overrides).ray, JOB, 1, namespace="fineloop")
    assert list(ray.jobs_fit_in_the_queue(beside("kind", job))) == []
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


def beside(overlay: str, job: Manifest) -> list[Manifest]:
    return [*(manifest for manifest in render_overlay(overlay) if manifest["kind"] != "RayJob"), job]


@pytest.mark.parametrize(("policy", "where", "value"), BREAKS, ids=lambda given: getattr(given, "__name__", None))
def test_a_policy_sees_it_when(policy: Policy, where: str, value: object) -> None:
    assert list(policy(changed(render_overlay("aws"), where, value)))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberays_autoscaler_alone_has_the_token_that_its_account_needs(overlay: str) -> None:
    places = {
        (pod.where, container["name"]): mount["mountPath"]
        for pod in every_pod(render_overlay(overlay))
        for container in pod.containers
        for mount in container.get("volumeMounts", [])
        if mount["name"] == "kubernetes-api"
    }
    head = "RayCluster/fineloop-experiments.spec.headGroupSpec.template"
    assert places == {(head, "autoscaler"): "/var/run/secrets/kubernetes.io/serviceaccount"}


def test_each_policy_can_be_broken() -> None:
    assert {policy for policy, _, _ in BREAKS} == {*POLICIES, pods.images_have_a_digest}


def test_a_published_service_is_seen() -> None:
    assert list(access.services_stay_inside(changed(render_overlay("kind"), "Service spec type", "NodePort")))


@pytest.mark.parametrize(("overlay", "expected"), [("kind", 0), ("gpu", 4), ("aws", 3)])
def test_what_is_to_be_filled_in_is_found(overlay: str, expected: int) -> None:
    found = " ".join(placeholders(render_overlay(overlay)))
    assert sum(meaning in found for meaning in PLACEHOLDERS.values()) == expected


def test_the_check_says_what_is_wrong_and_what_it_had_no_definition_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sys.argv", ["check", "kind"])
    assert check.main() == 0
    good, unchecked = capsys.readouterr().out.splitlines()
    assert "nothing wrong" in good
    assert re.search("make crds.*RayJob/fineloop-example", unchecked)
    broken = changed(changed(render_overlay("aws"), "LimitRange spec limit", []), "ConfigMap kind", "Ingress")
    monkeypatch.setattr(check, "render_overlay", lambda overlay: broken)
    assert check.main() == 1
    faults = ["'limit' was unexpected", "services_stay_inside: Ingress/", "registry.invalid stands for"]
    said = capsys.readouterr().out
    assert [fault for fault in faults if fault not in said] == []
