"""What must hold for every pod template, those inside RayJobs and RayClusters included."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from infra.checks.manifests import Manifest, of_kind, title

GPU = "nvidia.com/gpu"
SECRETS_MADE_BY_HAND = {"fineloop-s3", "fineloop-ray"}
VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_CREDENTIAL_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_CREDENTIAL = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY")


@dataclass(frozen=True)
class Pod:
    """A pod specification and where it stands."""

    where: str
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All of its containers."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    """Every pod specification, wherever it stands: what has `containers` is one."""
    for manifest in manifests:
        yield from _pods(manifest, title(manifest))


def _pods(value: Any, where: str) -> Iterator[Pod]:
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield Pod(where, value)
        for key, inner in value.items():
            yield from _pods(inner, f"{where}.{key}")
    if isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _pods(inner, f"{where}[{position}]")


def containers(manifests: list[Manifest]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every container, and the autoscaler's, which KubeRay adds to a head."""
    for pod in pods(manifests):
        for container in pod.containers:
            yield f"{pod.where} {container['name']}", container
    for cluster in of_kind(manifests, "RayCluster"):
        if cluster["spec"].get("enableInTreeAutoscaling"):
            yield f"{title(cluster)} autoscaler", cluster["spec"].get("autoscalerOptions", {})


def pods_do_not_run_as_root(manifests: list[Manifest]) -> Iterator[str]:
    """A user by number, and no container that takes it back."""
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.where}: set securityContext.runAsNonRoot and a runAsUser above 0"
        for container in pod.containers:
            own = container.get("securityContext", {})
            if own.get("runAsNonRoot") is False or own.get("runAsUser") == 0:
                yield f"{pod.where} {container['name']}: runs as root again"


def pods_have_no_privileges(manifests: list[Manifest]) -> Iterator[str]:
    """No capability, no way to gain one, the runtime's seccomp filter, and nothing of the node's."""
    for pod in pods(manifests):
        if pod.spec.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.where}: set securityContext.seccompProfile to RuntimeDefault"
        for shared in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(shared):
                yield f"{pod.where}: {shared} shares the node's"
        for volume in pod.spec.get("volumes", []):
            if not volume.keys() - {"name"} <= VOLUMES:
                yield f"{pod.where}: volume {volume['name']} is none of {sorted(VOLUMES)}"
    for where, container in containers(manifests):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{where}: set allowPrivilegeEscalation to false and drop privileged"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where}: drop all capabilities and add none"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{where}: takes a port of the node"


def root_filesystems_are_read_only(manifests: list[Manifest]) -> Iterator[str]:
    """What a process may write is a volume: it cannot change the code that runs."""
    for where, container in containers(manifests):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{where}: set readOnlyRootFilesystem"


def volumes_cannot_fill_the_node(manifests: list[Manifest]) -> Iterator[str]:
    """A full disk evicts the neighbours too."""
    for pod in pods(manifests):
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.where}: volume {volume['name']} has no sizeLimit"


def containers_ask_for_what_they_take(manifests: list[Manifest]) -> Iterator[str]:
    """Requests and limits everywhere; the same for Ray, which counts limits, and for GPUs, which cannot be shared."""
    for where, container in containers(manifests):
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        for resource in ("cpu", "memory"):
            if resource not in requests or resource not in limits:
                yield f"{where}: set requests and limits of {resource}"
        is_ray = where.startswith(("RayJob/", "RayCluster/"))
        if (is_ray or GPU in limits | requests) and _amounts(requests) != _amounts(limits):
            yield f"{where}: limits differ from requests"


def memory_volumes_fit_in_memory(manifests: list[Manifest]) -> Iterator[str]:
    """What lies in a memory volume counts as its container's memory."""
    for pod in pods(manifests):
        memory = sum(_amount(c.get("resources", {}).get("limits", {}).get("memory", 0)) for c in pod.containers)
        for volume in pod.spec.get("volumes", []):
            folder = volume.get("emptyDir") or {}
            if folder.get("medium") == "Memory" and _amount(folder.get("sizeLimit", 0)) > memory / 2:
                yield f"{pod.where}: volume {volume['name']} may take more than half of the containers' memory"


def images_are_pinned(manifests: list[Manifest]) -> Iterator[str]:
    """A tag that moves makes yesterday's run another one."""
    for where, image in _images(manifests):
        tag = image.rpartition("/")[2].partition(":")[2]
        if not DIGEST.search(image) and tag in ("", "latest"):
            yield f"{where}: image {image} has no fixed tag and no digest"


def images_have_a_digest(manifests: list[Manifest]) -> Iterator[str]:
    """Where a registry is in between, only a digest says what runs."""
    for where, image in _images(manifests):
        if not DIGEST.search(image):
            yield f"{where}: image {image} has no digest"


def accounts_are_named(manifests: list[Manifest]) -> Iterator[str]:
    """Each pod has an account of ours, and a token in the pod only where the account has rights to use it for."""
    accounts = {account["metadata"]["name"] for account in of_kind(manifests, "ServiceAccount")}
    bound = {s["name"] for binding in of_kind(manifests, "RoleBinding") for s in binding["subjects"]}
    bound |= _autoscaled_accounts(manifests)
    for pod in pods(manifests):
        account, automount = pod.spec.get("serviceAccountName"), pod.spec.get("automountServiceAccountToken")
        is_submitter = pod.where.endswith(".submitterPodTemplate.spec")  # talks to Ray alone: no identity at all
        if account not in accounts and not (is_submitter and account is None):
            yield f"{pod.where}: serviceAccountName {account} is none of {sorted(accounts)}"
        if automount is None or (automount and account not in bound):
            yield f"{pod.where}: set automountServiceAccountToken, and true only for {sorted(bound)}"


def nothing_secret_is_written_down(manifests: list[Manifest]) -> Iterator[str]:
    """Secrets are made by hand and referred to by name."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"{title(manifest)}: a Secret in a file is in everybody's clone"
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
    """ConfigMaps, claims and priorities are in the same manifests; the secrets are those of the runbook."""
    known = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    known |= {("Secret", name) for name in SECRETS_MADE_BY_HAND}
    for pod in pods(manifests):
        for kind, name in _references(pod):
            if (kind, name) not in known:
                yield f"{pod.where}: {kind} {name} does not exist"


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
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


def _images(manifests: list[Manifest]) -> Iterator[tuple[str, str]]:
    return ((where, container["image"]) for where, container in containers(manifests) if "image" in container)


def _autoscaled_accounts(manifests: list[Manifest]) -> set[str]:
    """KubeRay binds a Role of its own to these."""
    clusters = [c["spec"] for c in of_kind(manifests, "RayCluster") if c["spec"].get("enableInTreeAutoscaling")]
    return {spec["headGroupSpec"]["template"]["spec"].get("serviceAccountName") for spec in clusters}


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
