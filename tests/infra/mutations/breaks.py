"""How manifests are broken on purpose, and what must see it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.checks.check import Policy
from infra.checks.manifests import Manifest, of_kind

Mutation = Callable[[list[Manifest]], None]


@dataclass(frozen=True)
class Break:
    """A change of one overlay's manifests, made in place, and what it breaks: a policy, or a rule of checkov's."""

    policy: Policy | str
    overlay: str
    mutate: Mutation


def breaks(policy: Policy | str, overlay: str = "aws") -> Callable[[Mutation], Break]:
    """Say what the decorated mutation breaks."""
    return lambda mutation: Break(policy, overlay, mutation)


def the(manifests: list[Manifest], kind: str, name: str = "") -> Any:
    """The first object of a kind, or the one with a name."""
    return next(m for m in of_kind(manifests, kind) if name in ("", m["metadata"]["name"]))


def job(manifests: list[Manifest]) -> Any:
    """The RayJob's specification."""
    return the(manifests, "RayJob")["spec"]


def cluster(manifests: list[Manifest]) -> Any:
    """The shared RayCluster's specification."""
    return the(manifests, "RayCluster")["spec"]


def workers(manifests: list[Manifest]) -> Any:
    """The RayJob's group of workers."""
    return job(manifests)["rayClusterSpec"]["workerGroupSpecs"][0]


def pod(manifests: list[Manifest]) -> Any:
    """The RayJob's worker pod."""
    return workers(manifests)["template"]["spec"]


def container(manifests: list[Manifest]) -> Any:
    """The RayJob's worker container."""
    return pod(manifests)["containers"][0]


def reap(manifests: list[Manifest]) -> Any:
    """The reaper's pod."""
    return the(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
