"""Who can reach what in the cluster. The tests ask the evaluator; none reads a policy's text."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from infra.checks.manifests import INFRA, OVERLAYS, Manifest, of_kind, render_overlay
from tests.infra.ends import ENDS, OUTSIDE, RAY_PODS, TO_OUR_PODS, TO_OUTSIDE, TO_PODS, of_ours, who_reaches
from tests.infra.reach import End, address, matches, reaches


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(("target", "port", "expected"), TO_PODS)
def test_a_pod_is_reached_by_these_alone(overlay: str, target: str, port: int, expected: set[str]) -> None:
    found = who_reaches(render_overlay(overlay), ENDS[target], port)
    assert (of_ours(found) if ENDS[target].namespace != "fineloop" else found) == expected - {target}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(("target", "port", "expected"), TO_OUTSIDE)
def test_the_outside_is_reached_by_these_alone(overlay: str, target: str, port: int, expected: set[str]) -> None:
    assert of_ours(who_reaches(render_overlay(overlay), OUTSIDE[target], port)) == expected


def test_the_laptops_store_is_reached_by_steps_and_ray_pods_alone() -> None:
    manifests = render_overlay("kind")
    assert who_reaches(manifests, ENDS["s3"], 8333) == RAY_PODS | {"step"}
    assert who_reaches(manifests, ENDS["s3"], 8888) == set()  # the filer, which asks for no key


def test_ones_own_store_is_the_only_private_address_for_ray_pods() -> None:
    store = address("store", "203.0.113.10")
    manifests = render_overlay("gpu")
    assert of_ours(who_reaches(manifests, store, 443)) >= RAY_PODS
    assert not of_ours(who_reaches(manifests, OUTSIDE["private network"], 443)) & {"head", "worker"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_of_ours_can_look_up_names(overlay: str) -> None:
    dns = End("dns", {"k8s-app": "kube-dns"}, namespace="kube-system")
    ours = [end for end in ENDS.values() if end.namespace == "fineloop"]
    assert all(reaches(render_overlay(overlay), end, dns, 53, "UDP") for end in ours)


def test_ones_own_store_may_listen_on_any_port() -> None:
    """Whoever edits the overlay's file opens it to all who need it."""
    manifests, file = render_overlay("gpu"), INFRA / "overlays/gpu/s3.yaml"
    for edited in yaml.safe_load_all(file.read_text(encoding="utf-8").replace("port: 443", "port: 9000")):
        policy(manifests, edited["metadata"]["name"])["spec"] = edited["spec"]
    assert who_reaches(manifests, address("store", "203.0.113.10"), 9000) >= RAY_PODS | {"step"}


def policy(manifests: list[Manifest], name: str) -> Manifest:
    return next(p for p in of_kind(manifests, "NetworkPolicy") if p["metadata"]["name"] == name)


def drop_default_deny(manifests: list[Manifest]) -> None:
    manifests.remove(policy(manifests, "deny-everything"))


def forget_the_operators_namespace(manifests: list[Manifest]) -> None:
    policy(manifests, "ray")["spec"]["ingress"][1]["from"][2]["namespaceSelector"] = {}


def forget_the_operators_labels(manifests: list[Manifest]) -> None:
    del policy(manifests, "ray")["spec"]["ingress"][1]["from"][2]["podSelector"]


def let_steps_in_on_every_port(manifests: list[Manifest]) -> None:
    del policy(manifests, "ray")["spec"]["ingress"][1]["ports"]
    del policy(manifests, "steps")["spec"]["egress"][0]["ports"]


def let_everyone_in(manifests: list[Manifest]) -> None:
    policy(manifests, "ray")["spec"]["ingress"].append({})


def select_heads_alone(manifests: list[Manifest]) -> None:
    policy(manifests, "ray")["spec"]["podSelector"]["matchLabels"]["ray.io/node-type"] = "head"


def open_the_metadata_server(manifests: list[Manifest]) -> None:
    policy(manifests, "ray")["spec"]["egress"][1] = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}


@pytest.mark.parametrize(
    "mutation",
    [
        drop_default_deny,
        forget_the_operators_namespace,
        forget_the_operators_labels,
        let_steps_in_on_every_port,
        let_everyone_in,
        select_heads_alone,
        open_the_metadata_server,
    ],
)
def test_a_hole_changes_an_answer(mutation: Callable[[list[Manifest]], None]) -> None:
    manifests = render_overlay("aws")
    mutation(manifests)
    pods = {(target, port): who_reaches(manifests, ENDS[target], port) for target, port, _ in TO_OUR_PODS}
    outside = {(target, port): of_ours(who_reaches(manifests, OUTSIDE[target], port)) for target, port, _ in TO_OUTSIDE}
    expected = {(target, port): names - {target} for target, port, names in TO_OUR_PODS + TO_OUTSIDE}
    assert pods | outside != expected


A, B = End("a", {"app": "a"}, namespace="x"), End("b", {"app": "b"}, namespace="y")


def rule(direction: str, *rules: dict[str, object], namespace: str = "x") -> Manifest:
    spec = {"podSelector": {}, "policyTypes": [direction], direction.lower(): list(rules)}
    return {"kind": "NetworkPolicy", "metadata": {"namespace": namespace, "name": "p"}, "spec": spec}


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ([], True),
        ([rule("Egress")], False),
        ([rule("Ingress")], True),
        ([rule("Ingress", namespace="y")], False),
        ([rule("Egress", {})], True),
        ([rule("Egress"), rule("Egress", {"ports": [{"port": 80}]})], True),
        ([rule("Egress", {"ports": [{"port": 79, "endPort": 81}]})], True),
        ([rule("Egress", {"ports": [{"port": 80, "protocol": "UDP"}]})], False),
        ([rule("Egress", {"to": [{"podSelector": {}}]})], False),  # pods of its own namespace
        ([rule("Egress", {"to": [{"namespaceSelector": {}}]})], True),
        ([rule("Egress", {"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "a"}}}]})], False),
        ([rule("Egress", {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]})], True),
        ([rule("Egress", {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.0.0/16"]}}]})], False),
        ([rule("Egress", {}), rule("Ingress", {"from": [{"podSelector": {}}]}, namespace="y")], False),
    ],
)
def test_the_evaluator_judges_as_kubernetes_does(policies: list[Manifest], expected: bool) -> None:
    assert reaches(policies, A, B, 80) is expected


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [("In", ["a"], True), ("NotIn", ["a"], False), ("Exists", [], True), ("DoesNotExist", [], False)],
)
def test_the_evaluator_knows_every_operator(operator: str, values: list[str], expected: bool) -> None:
    selector = {"matchExpressions": [{"key": "app", "operator": operator, "values": values}]}
    assert matches(selector, {"app": "a"}) is expected


def test_an_unknown_operator_is_refused_rather_than_guessed() -> None:
    with pytest.raises(ValueError, match="none of In"):
        matches({"matchExpressions": [{"key": "app", "operator": "Gt", "values": ["1"]}]}, {"app": "2"})


def test_a_named_port_is_refused_rather_than_guessed() -> None:
    with pytest.raises(ValueError, match="write the number"):
        reaches([rule("Egress", {"ports": [{"port": "http"}]})], A, B, 80)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_own_pods_carry_the_labels_that_were_asked_about(overlay: str) -> None:
    manifests: Any = {manifest["kind"]: manifest.get("spec") for manifest in render_overlay(overlay)}
    reap = manifests["CronJob"]["jobTemplate"]["spec"]["template"]
    job, experiments = manifests["RayJob"], manifests["RayCluster"]
    assert reap["metadata"]["labels"].items() >= ENDS["reap"].labels.items()
    assert job["submitterPodTemplate"]["metadata"]["labels"].items() >= ENDS["submitter"].labels.items()
    autoscaled = {"fineloop.dev/autoscaler": "true"}
    assert experiments["headGroupSpec"]["template"]["metadata"]["labels"].items() >= autoscaled.items()
    assert not job["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"].items() >= autoscaled.items()
    if overlay == "kind":
        assert manifests["Deployment"]["template"]["metadata"]["labels"].items() >= ENDS["s3"].labels.items()
