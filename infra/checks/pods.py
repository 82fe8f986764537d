"""The pods of manifests, wherever their templates stand: inside RayJobs and RayClusters too."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.checks.manifests import Manifest, title


@dataclass(frozen=True)
class Pod:
    """A pod's template and where it stands."""

    where: str
    template: Mapping[str, Any]

    @property
    def spec(self) -> Mapping[str, Any]:
        """Its specification."""
        spec: Mapping[str, Any] = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All of its containers."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    def as_object(self) -> Manifest:
        """A Pod on its own, for tools that look into no RayJob, and not into every initial container."""
        metadata = {**self.template.get("metadata", {}), "name": self.where, "namespace": "fineloop"}
        spec = {**self.spec, "containers": self.containers, "initContainers": []}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    """Every pod, as KubeRay makes it."""
    for manifest in manifests:
        yield from _templates(_with_autoscaler(manifest), title(manifest))


def _templates(value: Any, where: str) -> Iterator[Pod]:
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and isinstance(value["spec"].get("containers"), list):
            yield Pod(where, value)
        for key, inner in value.items():
            yield from _templates(inner, f"{where}.{key}")
    if isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _templates(inner, f"{where}[{position}]")


def _with_autoscaler(manifest: Manifest) -> Manifest:
    """KubeRay adds a container of the head's image to the head (BuildAutoscalerContainer in common/pod.go)."""
    if manifest["kind"] != "RayCluster" or not manifest["spec"].get("enableInTreeAutoscaling"):
        return manifest
    whole = copy.deepcopy(manifest)
    containers = whole["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    if containers:
        options = whole["spec"].get("autoscalerOptions", {})
        containers.append({"name": "autoscaler", "image": containers[0]["image"], **options})
    return whole
