"""Rules for every pod, in addition to checkov's (`make infra-lint`), which know neither Ray nor our objects."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from infra.checks.manifests import Manifest, title
from infra.checks.pods import Pod, pods

GPU = "nvidia.com/gpu"
SECRETS_MADE_BY_HAND = {"fineloop-s3", "fineloop-ray"}
VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_CREDENTIAL_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_CREDENTIAL = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY")


def containers(manifests: list[Manifest]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All containers, each with its place in the manifests."""
    return ((f"{pod.where} {container['name']}", container) for pod in pods(manifests) for container in pod.containers)


def volumes_spare_the_node(manifests: list[Manifest]) -> Iterator[str]:
    """No pod mounts a folder of the node, or has a volume that fills its disk: that evicts the neighbours too."""
    for pod in pods(manifests):
        for volume in pod.spec.get("volumes", []):
            if not volume.keys() - {"name"} <= VOLUMES:
                yield f"{pod.where}: volume {volume['name']} is none of {sorted(VOLUMES)}"
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.where}: volume {volume['name']} has no sizeLimit"


def no_pod_takes_a_sidecar(manifests: list[Manifest]) -> Iterator[str]:
    """No pod gets an Istio sidecar. If Kubeflow serves several namespaces, it labels them istio-injection=enabled. A
    pod never ends while its sidecar stays, Ray talks on its own ports, and setting up a sidecar asks for more than the
    namespace admits."""
    for pod in pods(manifests):
        if pod.template.get("metadata", {}).get("labels", {}).get("sidecar.istio.io/inject") != "false":
            yield f'{pod.where}: no label sidecar.istio.io/inject: "false"'


def ray_asks_for_what_it_takes(manifests: list[Manifest]) -> Iterator[str]:
    """Ray and GPU containers request their limits. Ray counts limits, and a GPU cannot be shared, so lower requests
    would promise more than there is."""
    for where, container in containers(manifests):
        requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
        is_ray = where.startswith(("RayJob/", "RayCluster/"))
        if (is_ray or GPU in limits | requests) and _amounts(requests) != _amounts(limits):
            yield f"{where}: limits differ from requests"


def memory_volumes_fit_in_memory(manifests: list[Manifest]) -> Iterator[str]:
    """Memory volumes take at most half of the memory, because their content counts as their container's memory."""
    for pod in pods(manifests):
        memory = sum(_amount(c.get("resources", {}).get("limits", {}).get("memory", 0)) for c in pod.containers)
        for volume in pod.spec.get("volumes", []):
            folder = volume.get("emptyDir") or {}
            if folder.get("medium") == "Memory" and _amount(folder.get("sizeLimit", 0)) > memory / 2:
                yield f"{pod.where}: volume {volume['name']} may take more than half of the containers' memory"


def images_have_a_digest(manifests: list[Manifest]) -> Iterator[str]:
    """Every image has a digest: with a registry in between, only a digest says what runs."""
    for where, container in containers(manifests):
        image = container.get("image", "")
        if not _DIGEST.search(image):
            yield f"{where}: image {image} has no digest"


def nothing_secret_is_written_down(manifests: list[Manifest]) -> Iterator[str]:
    """No secret is in a manifest: secrets are made by hand and referred to by name."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"{title(manifest)}: a Secret in a file is in every clone"
        for where, name, text in _texts(manifest, title(manifest)):
            if _CREDENTIAL.search(text):
                yield f"{where}: holds a key"
            in_environment = manifest["kind"] == "ConfigMap" and ".data" in where
            if in_environment and _CREDENTIAL_NAME.search(name):
                yield f"{where}: a secret in a ConfigMap"
    for where, container in containers(manifests):
        for variable in container.get("env", []):
            if _CREDENTIAL_NAME.search(variable["name"]) and "value" in variable:
                yield f"{where}: {variable['name']} has a value: take it from a Secret"


def what_pods_refer_to_exists(manifests: list[Manifest]) -> Iterator[str]:
    """Accounts, ConfigMaps, claims and priorities are in the same manifests; the secrets are those of the runbook."""
    known = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    known |= {("Secret", name) for name in SECRETS_MADE_BY_HAND}
    for pod in pods(manifests):
        for kind, name in _references(pod):
            if (kind, name) not in known:
                yield f"{pod.where}: {kind} {name} does not exist"


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    if not pod.where.endswith(".submitterPodTemplate"):  # it talks only to Ray, and needs no account of ours
        yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
    if "priorityClassName" in pod.spec:
        yield "PriorityClass", pod.spec["priorityClassName"]
    for volume in pod.spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
    for container in pod.containers:
        sources = [*container.get("envFrom", []), *[v.get("valueFrom", {}) for v in container.get("env", [])]]
        for source in sources:
            for field, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
                for suffix in ("Ref", "KeyRef"):
                    if field + suffix in source:
                        yield kind, source[field + suffix]["name"]


def _texts(value: Any, where: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}", key)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, where, name)
    elif isinstance(value, str):
        yield where, name, value


def _amounts(resources: Mapping[str, Any]) -> dict[str, Decimal]:
    return {name: _amount(value) for name, value in resources.items()}


def _amount(quantity: Any) -> Decimal:
    return Decimal(parse_quantity(quantity))
