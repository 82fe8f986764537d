"""What KubeRay's controller and Kueue's webhook demand of a RayJob or RayCluster beyond their schemas, and what we do.

Sources: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, and pkg/controller/jobs/rayjob of Kueue 0.19.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from decimal import Decimal
from importlib import metadata
from typing import Any

import yaml
from kubernetes.utils.quantity import parse_quantity

from infra.checks.manifests import Manifest, of_kind, title
from infra.checks.pods import pods

MAX_NAME = {"RayJob": 47, "RayCluster": 63}
MAX_WORKER_GROUPS = 17
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
"""The schema takes any text."""
_DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


def clusters(manifests: list[Manifest]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every cluster specification, a RayJob's own too."""
    for manifest in of_kind(manifests, "RayJob", "RayCluster"):
        spec = manifest["spec"]
        if manifest["kind"] == "RayCluster" or "rayClusterSpec" in spec:
            yield title(manifest), spec.get("rayClusterSpec", spec)


def groups(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The head's group, then the workers'."""
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def kuberay_takes_the_jobs(manifests: list[Manifest]) -> Iterator[str]:
    """The operator's own checks of a RayJob: what fails them ends as ValidationFailed, after it was admitted."""
    for job in of_kind(manifests, "RayJob"):
        spec, where = job["spec"], title(job)
        mode, shutdown = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
        ttl, rules = spec.get("ttlSecondsAfterFinished", 0), spec.get("deletionStrategy")
        selector, head = spec.get("clusterSelector"), spec.get("rayClusterSpec", {}).get("headGroupSpec", {})
        restart = head.get("template", {}).get("spec", {}).get("restartPolicy", "Never")
        broken = {
            f"submissionMode {mode} is none of {SUBMISSION_MODES}": mode not in SUBMISSION_MODES,
            "one of rayClusterSpec or clusterSelector": bool(selector) == ("rayClusterSpec" in spec),
            "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not shutdown,
            "ttlSecondsAfterFinished is negative": ttl < 0,
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": ttl > 0 and not shutdown,
            "deletionStrategy excludes shutdownAfterJobFinishes and a ttl": rules and (shutdown or ttl),
            "clusterSelector excludes suspend": selector and spec.get("suspend"),
            "clusterSelector excludes backoffLimit": selector and spec.get("backoffLimit", 0),
            "SidecarMode excludes clusterSelector": mode == "SidecarMode" and selector,
            "SidecarMode excludes submitterPodTemplate": mode == "SidecarMode" and "submitterPodTemplate" in spec,
            "SidecarMode excludes submitterConfig": mode == "SidecarMode" and "submitterConfig" in spec,
            "SidecarMode needs the head's restartPolicy Never": mode == "SidecarMode" and restart != "Never",
            "InteractiveMode excludes backoffLimit": mode == "InteractiveMode" and spec.get("backoffLimit", 0),
            "activeDeadlineSeconds must be positive": spec.get("activeDeadlineSeconds", 1) <= 0,
            "preRunningDeadlineSeconds must be positive": spec.get("preRunningDeadlineSeconds", 1) <= 0,
            "backoffLimit is negative": spec.get("backoffLimit", 0) < 0,
            "runtimeEnvYAML is no YAML mapping": not _is_mapping(spec.get("runtimeEnvYAML", "{}")),
        }
        yield from (f"{where}: {rule}" for rule, holds in broken.items() if holds)


def kuberay_takes_the_clusters(manifests: list[Manifest]) -> Iterator[str]:
    """The operator's own checks of a cluster."""
    for manifest in of_kind(manifests, "RayJob", "RayCluster"):
        name, longest = manifest["metadata"]["name"], MAX_NAME[manifest["kind"]]
        if len(name) > longest or not _DNS_1035.match(name):
            yield f"{title(manifest)}: a name is a DNS label that begins with a letter, of at most {longest}"
    for where, cluster in clusters(manifests):
        repeated = Counter(group["groupName"] for group in cluster.get("workerGroupSpecs", []))
        if max(repeated.values(), default=0) > 1:
            yield f"{where}: two worker groups have one name"
        for group in groups(cluster):
            if not group["template"]["spec"].get("containers"):
                yield f"{where}: a group has no container"
            params = group.get("rayStartParams", {})
            if group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
                yield f"{where}: resources stand both in rayStartParams and in resources"
        for group in cluster.get("workerGroupSpecs", []):
            if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
                yield f"{where}: replicas of {group['groupName']} lie outside minReplicas and maxReplicas"
        if cluster.get("enableInTreeAutoscaling"):
            policies = {group["template"]["spec"].get("restartPolicy", "Never") for group in groups(cluster)}
            if cluster.get("autoscalerOptions", {}).get("version") != "v2":
                yield f"{where}: set autoscalerOptions.version to v2: v1 is no longer developed"
            elif policies != {"Never"}:
                yield f"{where}: autoscaler v2 needs restartPolicy Never in every group"


def no_pod_of_kuberays_own_is_refused(manifests: list[Manifest]) -> Iterator[str]:
    """KubeRay's default submitter has no securityContext, and a restricted namespace refuses it."""
    for job in of_kind(manifests, "RayJob"):
        mode = job["spec"].get("submissionMode", "K8sJobMode")
        if mode == "SidecarMode" or (mode == "K8sJobMode" and "submitterPodTemplate" not in job["spec"]):
            yield f"{title(job)}: take HTTPMode, or K8sJobMode with a submitterPodTemplate of your own"


def kueue_takes_the_jobs(manifests: list[Manifest]) -> Iterator[str]:
    """Kueue's webhook, and the labels without which a job bypasses Kueue."""
    queues = {queue["metadata"]["name"] for queue in of_kind(manifests, "LocalQueue")}
    priorities = {priority["metadata"]["name"] for priority in of_kind(manifests, "WorkloadPriorityClass")}
    for job in of_kind(manifests, "RayJob"):
        labels, spec = job["metadata"].get("labels", {}), job["spec"]
        cluster = spec.get("rayClusterSpec", {})
        broken = {
            f"label {QUEUE} names no LocalQueue": labels.get(QUEUE) not in queues,
            f"label {PRIORITY} names no WorkloadPriorityClass": labels.get(PRIORITY) not in priorities,
            "shutdownAfterJobFinishes must be true": spec.get("shutdownAfterJobFinishes") is not True,
            "clusterSelector bypasses Kueue": "clusterSelector" in spec,
            "deletionStrategy is not for queued jobs": "deletionStrategy" in spec,
            "suspend is Kueue's own": "suspend" in spec,
            "an autoscaler would leave its quota": cluster.get("enableInTreeAutoscaling"),
            f"more than {MAX_WORKER_GROUPS} worker groups": len(cluster.get("workerGroupSpecs", []))
            > MAX_WORKER_GROUPS,
        }
        yield from (f"{title(job)}: {rule}" for rule, holds in broken.items() if holds)


def jobs_are_gangs(manifests: list[Manifest]) -> Iterator[str]:
    """All workers or none, and none on the head."""
    for job in of_kind(manifests, "RayJob"):
        cluster = job["spec"].get("rayClusterSpec", {})
        for group in cluster.get("workerGroupSpecs", []):
            if not group["minReplicas"] == group.get("replicas") == group["maxReplicas"]:
                yield f"{title(job)}: replicas, minReplicas and maxReplicas of {group['groupName']} differ"
    for where, cluster in clusters(manifests):
        if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            yield f"{where}: set the head's num-cpus to 0, or it takes a worker"


def jobs_end(manifests: list[Manifest]) -> Iterator[str]:
    """A job that hangs, or never starts, gives its GPUs back."""
    for job in of_kind(manifests, "RayJob"):
        for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"):
            if not job["spec"].get(field):
                yield f"{title(job)}: set {field}"


def clusters_ask_for_a_token(manifests: list[Manifest]) -> Iterator[str]:
    """Whoever reaches the Jobs API runs code: the network's rules are one lock, this is the other."""
    for where, cluster in clusters(manifests):
        if cluster.get("authOptions") != {"mode": "token", "secretName": "fineloop-ray"}:
            yield f"{where}: set authOptions to mode token and secretName fineloop-ray"


def no_job_has_a_kubernetes_token(manifests: list[Manifest]) -> Iterator[str]:
    """Jobs run in every container of a Ray pod but KubeRay's autoscaler, whose account may patch pods. A token that
    is mounted by default is in all of them, and one process namespace shows each the others' files."""
    for pod in pods(manifests):
        if not pod.where.startswith(("RayJob/", "RayCluster/")):
            continue
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: set automountServiceAccountToken to false: its jobs would have the account's token"
        tokens = {volume["name"] for volume in pod.spec.get("volumes", []) if _has_token(volume)}
        if tokens and pod.spec.get("shareProcessNamespace"):
            yield f"{pod.where}: shareProcessNamespace shows its jobs the token of {', '.join(sorted(tokens))}"
        for container in pod.containers:
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            if container["name"] != "autoscaler" and mounts & tokens:
                yield f"{pod.where}: container {container['name']} runs jobs and mounts a token"


def _has_token(volume: Mapping[str, Any]) -> bool:
    return any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))


def versions_agree(manifests: list[Manifest]) -> Iterator[str]:
    """Ray refuses to join nodes of different versions, and a job of another."""
    ray, ours = metadata.version("ray"), metadata.version("fineloop")
    for where, cluster in clusters(manifests):
        if cluster.get("rayVersion") != ray:
            yield f"{where}: rayVersion {cluster.get('rayVersion')} is not {ray}, which is installed"
        for group in groups(cluster):
            for container in group["template"]["spec"].get("containers", []):
                image = container["image"].partition("@")[0].rpartition("/")[2]
                name, _, tag = image.partition(":")
                if name == "train" and tag not in ("", ours) and not tag.startswith(f"{ours}-"):
                    yield f"{where}: image tag {tag} is not {ours}, this project's version"


def jobs_fit_in_the_queue(manifests: list[Manifest]) -> Iterator[str]:
    """A job larger than its queue waits for ever; a queue larger than the namespace's quota admits it in vain."""
    nominal = _nominal(manifests)
    for job in of_kind(manifests, "RayJob"):
        for resource, amount in _requests(job["spec"]).items():
            if amount > nominal.get(resource, 0):
                yield f"{title(job)}: asks for {amount} of {resource}, the queue has {nominal.get(resource, 0)}"
    quota = {
        name.removeprefix("requests."): parse_quantity(amount)
        for manifest in of_kind(manifests, "ResourceQuota")
        for name, amount in manifest["spec"]["hard"].items()
        if name.startswith("requests.")
    }
    for resource, amount in nominal.items():
        if resource not in quota or amount > quota[resource]:
            yield f"ClusterQueue: {amount} of {resource} is above the namespace's quota of {quota.get(resource)}"


def flavors_ask_for_no_label_of_the_gpu_operator(manifests: list[Manifest]) -> Iterator[str]:
    """A flavor's labels become its workers' node selector, and NVIDIA's device plugin sets no gpu.present.

    The GPU operator does, and some node images; elsewhere a job would be admitted and wait for ever.
    """
    for flavor in of_kind(manifests, "ResourceFlavor"):
        if "nvidia.com/gpu.present" in flavor["spec"].get("nodeLabels", {}):
            yield f"{title(flavor)}: not every GPU node has the label nvidia.com/gpu.present"


def _nominal(manifests: list[Manifest]) -> Mapping[str, Decimal]:
    totals: defaultdict[str, Decimal] = defaultdict(Decimal)
    for queue in of_kind(manifests, "ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                for resource in flavor["resources"]:
                    totals[resource["name"]] += parse_quantity(resource["nominalQuota"])
    return totals


def _requests(job: Mapping[str, Any]) -> Mapping[str, Decimal]:
    """Resources that head, workers and submitter request together, which is what Kueue admits."""
    templates = [(group["template"], group.get("replicas", 1)) for group in groups(job["rayClusterSpec"])]
    templates += [(job["submitterPodTemplate"], 1)] if "submitterPodTemplate" in job else []
    totals: defaultdict[str, Decimal] = defaultdict(Decimal)
    for template, replicas in templates:
        for container in template["spec"].get("containers", []):
            for resource, amount in container.get("resources", {}).get("requests", {}).items():
                totals[resource] += parse_quantity(amount) * replicas
    return totals


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False
