"""Resources that a config's Ray job requests from Kueue, and whether a ClusterQueue can ever grant them."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.rayjob_manifest import rayjob

Resources = Mapping[str, Decimal]


def demand(ray: RayConfig) -> Resources:
    """Return the sum of the requests of head, workers and submitter, which Kueue admits together."""
    from kubernetes.utils.quantity import parse_quantity

    spec = rayjob(ray, Job("quota", "finetune", ("true",), 60.0), 1, namespace="any")["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [(1, cluster["headGroupSpec"]["template"]), (1, spec["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    total: dict[str, Decimal] = {}
    for count, template in pods:
        for container in template["spec"]["containers"]:
            for name, quantity in container["resources"]["requests"].items():
                total[name] = total.get(name, Decimal(0)) + count * parse_quantity(quantity)
    return total


def lacking(wanted: Resources, cluster_queue: Mapping[str, Any]) -> list[str]:
    """Return why the queue can never grant this, in words: resources that it does not cover, or too small a quota."""
    from kubernetes.utils.quantity import parse_quantity

    room: dict[str, Decimal] = {}
    for name, quota, borrowed in _quotas(cluster_queue):
        room[name] = max(room.get(name, Decimal(0)), parse_quantity(quota) + parse_quantity(borrowed))
    return [
        f"{name}: {_formatted(need)} asked for, at most {_formatted(room[name])} given"
        if name in room
        else f"{name}: not covered by the queue"
        for name, need in wanted.items()
        if need > room.get(name, Decimal(-1))
    ]


def _quotas(cluster_queue: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    in_cohort = bool(cluster_queue["spec"].get("cohortName"))
    for group in cluster_queue["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            for resource in flavor["resources"]:
                unlimited = "1Ei" if in_cohort else "0"  # without a limit it may borrow all that its cohort has
                yield resource["name"], str(resource["nominalQuota"]), str(resource.get("borrowingLimit", unlimited))


def _formatted(quantity: Decimal) -> str:
    gib = quantity / 2**30
    return f"{gib:.0f} GiB" if gib >= 1 else f"{quantity.normalize():f}"
