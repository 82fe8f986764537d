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
