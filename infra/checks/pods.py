"""The pods of manifests, wherever their templates are: also inside RayJobs and RayClusters."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.checks.manifests import Manifest, title


@dataclass(frozen=True)
class Pod:
    """A pod's template, and its place in the manifests."""

    where: str
    template: Mapping[str, Any]

    @property
    def spec(self) -> Mapping[str, Any]:
        """The pod's specification."""
        spec: Mapping[str, Any] = self.template["spec"]
        return spec

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All containers of the pod, including init containers."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    def as_object(self) -> Manifest:
        """The pod as a separate object, for tools that do not look into RayJobs, nor into every init container."""
        metadata = {**self.template.get("metadata", {}), "name": self.where, "namespace": "fineloop"}
        spec = {**self.spec, "containers": self.containers, "initContainers": []}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    """All pods of the manifests, as KubeRay makes them."""
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
    """Add the container that KubeRay adds to the head, with its image (BuildAutoscalerContainer in common/pod.go)."""
    if manifest["kind"] != "RayCluster" or not manifest["spec"].get("enableInTreeAutoscaling"):
        return manifest
    whole = copy.deepcopy(manifest)
    containers = whole["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    if containers:
        options = whole["spec"].get("autoscalerOptions", {})
        containers.append({"name": "autoscaler", "image": containers[0]["image"], **options})
    return whole
