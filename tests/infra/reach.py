"""Who can open a connection to whom, by the NetworkPolicies alone: the semantics of networking.k8s.io/v1, in small.

A pod that no policy selects for a direction is open in it; one that is selected lets through what some rule allows. A
connection needs both ends to let it through. Where Kubernetes leaves it to the network plugin whether an ipBlock also
matches pods, it does here: what is closed here is closed with every plugin.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.checks.manifests import Manifest, of_kind

NAMESPACE = "fineloop"


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or an address outside the cluster, which has no labels."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = "10.244.1.7"
    is_pod: bool = True


def address(name: str, ip: str) -> End:
    """An address that is no pod's."""
    return End(name, namespace="", address=ip, is_pod=False)


def reaches(manifests: Iterable[Manifest], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets out of its source and into its target."""
    policies = list(of_kind(manifests, "NetworkPolicy"))
    out = _lets_through(policies, source, target, "Egress", port, protocol)
    return out and _lets_through(policies, target, source, "Ingress", port, protocol)


def _lets_through(policies: list[Manifest], pod: End, other: End, direction: str, port: int, protocol: str) -> bool:
    if not pod.is_pod:
        return True
    selecting = [policy for policy in policies if _selects(policy, pod) and direction in _directions(policy["spec"])]
    rules = [rule for policy in selecting for rule in policy["spec"].get(direction.lower()) or []]
    peers = "to" if direction == "Egress" else "from"
    return not selecting or any(
        _has_port(rule.get("ports"), port, protocol) and _has_peer(rule.get(peers), other, pod.namespace)
        for rule in rules
    )


def _selects(policy: Manifest, pod: End) -> bool:
    return policy["metadata"]["namespace"] == pod.namespace and matches(policy["spec"]["podSelector"], pod.labels)


def _directions(spec: Mapping[str, Any]) -> list[str]:
    default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    return spec.get("policyTypes") or default


def _has_port(ports: list[dict[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for allowed in ports:
        first = allowed.get("port")
        if isinstance(first, str):
            raise ValueError(f"port {first!r}: write the number, which is what this evaluator knows")
        last = allowed.get("endPort", first)
        if allowed.get("protocol", "TCP") == protocol and (first is None or first <= port <= last):
            return True
    return False


def _has_peer(peers: list[dict[str, Any]] | None, other: End, namespace: str) -> bool:
    return not peers or any(_is_peer(peer, other, namespace) for peer in peers)


def _is_peer(peer: Mapping[str, Any], other: End, namespace: str) -> bool:
    if "ipBlock" in peer:
        block, ip = peer["ipBlock"], ipaddress.ip_address(other.address)
        inside = ip in ipaddress.ip_network(block["cidr"])
        return inside and not any(ip in ipaddress.ip_network(hole) for hole in block.get("except", []))
    if not other.is_pod:
        return False
    if "namespaceSelector" in peer:
        in_namespace = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        in_namespace = other.namespace == namespace
    return in_namespace and matches(peer.get("podSelector", {}), other.labels)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return equal and all(_holds(expression, labels) for expression in selector.get("matchExpressions", []))


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case other:
            raise ValueError(f"operator {other!r} is none of In, NotIn, Exists, DoesNotExist")
