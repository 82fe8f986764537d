"""Who can reach what in the cluster, by the NetworkPolicies alone. The tests ask an evaluator; none reads a policy.

It has the semantics of networking.k8s.io/v1, in small. A pod that no policy selects for a direction is open in it; one
that is selected lets through what some rule allows. A connection needs both ends to let it through. Where Kubernetes
leaves it to the network plugin whether an ipBlock also matches pods, it does here: what is closed here is closed with
every plugin.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.checks.manifests import OBSERVABILITY, OVERLAYS, TRACKER, Manifest, of_kind, render_overlay
from infra.checks.pods import pods
from tests.infra.changes import changed
from tests.infra.created import CONFIGS, created


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or, without a namespace, an address outside the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = "fineloop"
    address: str = "10.244.1.7"


def reaches(manifests: Iterable[Manifest], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets out of its source and into its target."""
    policies = list(of_kind(manifests, "NetworkPolicy"))
    out = _lets_through(policies, source, target, "Egress", port, protocol)
    return out and _lets_through(policies, target, source, "Ingress", port, protocol)


def _lets_through(policies: list[Manifest], pod: End, other: End, direction: str, port: int, protocol: str) -> bool:
    selecting = [policy["spec"] for policy in policies if _selects(policy, pod, direction)]
    rules = [rule for spec in selecting for rule in spec.get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return not selecting or any(
        (not rule.get("ports") or any(_is_port(allowed, port, protocol) for allowed in rule["ports"]))
        and (not rule.get(peers) or any(_is_peer(peer, other, pod.namespace) for peer in rule[peers]))
        for rule in rules
    )


def _selects(policy: Manifest, pod: End, direction: str) -> bool:
    spec, is_near = policy["spec"], policy["metadata"]["namespace"] == pod.namespace
    directions = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return is_near and direction in directions and _matches(spec["podSelector"], pod.labels)


def _is_port(allowed: Mapping[str, Any], port: int, protocol: str) -> bool:
    first = allowed.get("port", port)
    if not isinstance(first, int):
        raise ValueError(f"port {first!r}: write the number, which is what this evaluator knows")
    return bool(allowed.get("protocol", "TCP") == protocol and first <= port <= allowed.get("endPort", first))


def _is_peer(peer: Mapping[str, Any], other: End, namespace: str) -> bool:
    if block := peer.get("ipBlock"):
        ip, holes = ipaddress.ip_address(other.address), block.get("except", [])
        return ip in ipaddress.ip_network(block["cidr"]) and not any(ip in ipaddress.ip_network(hole) for hole in holes)
    near = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    is_there = _matches(peer.get("namespaceSelector", near), {"kubernetes.io/metadata.name": other.namespace})
    return bool(other.namespace) and is_there and _matches(peer.get("podSelector", {}), other.labels)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "NotIn":
            raise ValueError(f"operator {expression['operator']}: this evaluator knows NotIn alone")
        if labels.get(expression["key"]) in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


RAY = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", "app.kubernetes.io/part-of": "fineloop"}
"""KubeRay puts the first two on each of its pods."""
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
STEP = {"pipelines.kubeflow.org/v2_component": "true", "workflows.argoproj.io/workflow": "fineloop-retrain-x7"}
SERVER = {"application-crd-id": "kubeflow-pipelines", "app": "ml-pipeline"}
OURS = {
    "head": End(RAY | {"ray.io/node-type": "head", "ray.io/cluster": "one"}),
    "worker": End(RAY | {"ray.io/node-type": "worker", "ray.io/cluster": "one"}),
    "experiments": End(RAY | {"ray.io/node-type": "head", "fineloop.dev/autoscaler": "true"}),
    "evaluation": End(RAY | {"ray.io/node-type": "head", "ray.io/cluster": "two", "fineloop.dev/task": "evaluate"}),
    "its submitter": End({"app.kubernetes.io/component": "ray-submitter", "fineloop.dev/task": "evaluate"}),
    "submitter": End({"app.kubernetes.io/component": "ray-submitter", "app.kubernetes.io/part-of": "fineloop"}),
    "step": End(STEP),
    "reap": End({"app.kubernetes.io/name": "fineloop-reap", "app.kubernetes.io/part-of": "fineloop"}),
    "kubeflow": End(SERVER),
    "s3": End({"app.kubernetes.io/name": "fineloop-s3", "app.kubernetes.io/part-of": "fineloop"}),
    "neighbour": End({"app": "notebook"}),
}
OTHERS = {
    "kubeflow elsewhere": End(SERVER, namespace="kubeflow"),
    "model registry": End({"component": "model-registry-server"}, namespace="kubeflow"),
    "operator": End(OPERATOR, namespace="ray-system"),
    "prometheus": End({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring"),
    "stranger with our labels": End(RAY | STEP | SERVER, namespace="default"),
    "stranger with the operator's labels": End(OPERATOR, namespace="default"),
    "another pod beside the operator": End({"app": "web"}, namespace="ray-system"),
}
OUTSIDE = {
    "metadata server": End(namespace="", address="169.254.169.254"),
    # docs.aws.amazon.com/eks/latest/userguide/pod-id-agent-setup.html
    "pod identity agent": End(namespace="", address="169.254.170.23"),
    "internet": End(namespace="", address="52.216.8.21"),
    "Kubernetes API": End(namespace="", address="10.96.0.1"),
    "private network": End(namespace="", address="192.168.7.7"),
}
STORE = End(namespace="", address="203.0.113.10")
TRAINING = {"head", "worker", "experiments"}
RAY_PODS = TRAINING | {"evaluation"}
JOBS_API = TRAINING | {"step", "reap", "submitter", "its submitter", "operator"}
REACHED: dict[tuple[str, int], set[str]] = {
    ("head", 8265): JOBS_API,
    ("head", 6379): TRAINING,
    ("head", 8080): TRAINING | {"prometheus"},
    ("worker", 8265): JOBS_API,
    ("worker", 10002): TRAINING,
    ("evaluation", 8265): {"step", "reap", "its submitter", "operator"},
    ("evaluation", 6379): set(),
    ("evaluation", 8080): {"prometheus"},
    ("experiments", 8265): JOBS_API,
    ("kubeflow", 8888): {"step", "reap"},
    ("kubeflow", 8887): {"step"},
    ("kubeflow", 3306): set(),
    ("kubeflow", 9090): {"prometheus"},
    ("kubeflow elsewhere", 8888): {"step", "reap"},
    ("kubeflow elsewhere", 3306): set(),
    ("model registry", 8080): {"step"},
    ("step", 8080): set(),
    ("neighbour", 8888): set(),
    ("metadata server", 80): set(),
    ("metadata server", 443): set(),
    ("pod identity agent", 80): RAY_PODS | {"step"},
    ("pod identity agent", 443): set(),
    ("internet", 443): RAY_PODS | {"step", "reap", "kubeflow"},
    ("internet", 587): {"step"},
    ("internet", 22): set(),
    ("Kubernetes API", 443): {"experiments", "step", "reap", "kubeflow"},
    ("Kubernetes API", 6443): {"experiments", "step", "reap", "kubeflow"},
    ("private network", 5432): set(),
}


def who_reaches(manifests: list[Manifest], target: End, port: int) -> set[str]:
    """Pods of other namespaces leave by their own rules, which are judged for pods of ours alone."""
    sources = OURS | OTHERS if target.namespace == "fineloop" else OURS
    return {name for name, end in sources.items() if end != target and reaches(manifests, end, target, port)}


def answers(manifests: list[Manifest]) -> dict[tuple[str, int], set[str]]:
    ends = OURS | OTHERS | OUTSIDE
    return {(name, port): who_reaches(manifests, ends[name], port) for name, port in REACHED}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_end_is_reached_by_these_alone(overlay: str) -> None:
    expected = {(name, port): who - {name} for (name, port), who in REACHED.items()}
    assert answers(render_overlay(overlay)) == expected


def test_watching_opens_the_workflow_controllers_metrics_to_prometheus_and_nothing_else() -> None:
    manifests = render_overlay("aws", OBSERVABILITY)
    assert who_reaches(manifests, End({"app": "workflow-controller"}), 9090) == {"prometheus"}
    assert answers(manifests) == answers(render_overlay("aws"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_mlflow_in_the_cluster_is_reached_once_its_line_is_taken_in(overlay: str) -> None:
    mlflow = End({"app": "mlflow"}, namespace="mlflow")
    assert who_reaches(render_overlay(overlay), mlflow, 5000) == set()
    manifests = render_overlay(overlay, TRACKER)
    assert who_reaches(manifests, mlflow, 5000) == RAY_PODS | {"step"}
    assert who_reaches(manifests, End({"app": "another"}, namespace="mlflow"), 5000) == set()
    assert answers(manifests) == answers(render_overlay(overlay))


def test_the_laptops_store_is_reached_by_steps_and_ray_pods_alone() -> None:
    manifests = render_overlay("kind")
    assert who_reaches(manifests, OURS["s3"], 8333) == RAY_PODS | {"step"}
    assert who_reaches(manifests, OURS["s3"], 8888) == set()  # the filer, which asks for no key


@pytest.mark.parametrize("port", [443, 9000])
def test_ones_own_store_is_opened_to_all_who_need_it_by_the_overlays_file(port: int) -> None:
    manifests = render_overlay("gpu")
    for policy in ("to-s3", "steps-to-s3"):
        changed(manifests, f"NetworkPolicy={policy} spec egress 0 ports 0 port", port)
    assert who_reaches(manifests, STORE, port) >= RAY_PODS | {"step"}
    assert not who_reaches(manifests, OUTSIDE["private network"], port) & {"head", "worker"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_of_ours_can_look_up_names(overlay: str) -> None:
    dns = End({"k8s-app": "kube-dns"}, namespace="kube-system")
    openshifts = End({"dns.operator.openshift.io/daemonset-dns": "default"}, namespace="openshift-dns")
    for end in OURS.values():
        assert reaches(render_overlay(overlay), end, dns, 53, "UDP")
        assert reaches(render_overlay(overlay), end, openshifts, 5353, "UDP")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_own_pods_carry_the_labels_that_were_asked_about(overlay: str) -> None:
    for pod in pods([*render_overlay(overlay), *map(created, CONFIGS.values())]):
        labels = pod.template["metadata"]["labels"]
        for where, name in {"CronJob/": "reap", ".submitterPodTemplate": "submitter", "Deployment/": "s3"}.items():
            assert where not in pod.where or labels.items() >= OURS[name].labels.items()
        asks_kubernetes = pod.where == "RayCluster/fineloop-experiments.spec.headGroupSpec.template"
        assert ("fineloop.dev/autoscaler" in labels) == asks_kubernetes
