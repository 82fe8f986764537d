"""The RayJob of one attempt at a job, from its config alone: https://ray-project.github.io/kuberay/reference/api/.

What Kubernetes, Kueue or KubeRay require beyond the schema:

- Kueue admits head and workers together or not at all, for the sizes it reads here, and no RayJob whose sizes an
  autoscaler changes: replicas are as many pods as the most workers need. Elastic workers begin with all of them, go on
  with fewer when a pod is lost, and with all again once KubeRay has it back. Kueue admits a part of a RayJob only
  under an alpha gate, by the autoscaler (ElasticJobsViaWorkloadSlices).
- Kueue refuses a RayJob whose cluster would stay, and `deletionStrategy`: so shutdownAfterJobFinishes with a ttl.
- The namespace admits restricted pods alone. KubeRay copies a worker's security context to its init container, but
  gives neither the sidecar of SidecarMode nor the default submitter of K8sJobMode one; only the latter can be replaced.
- HTTPMode has no submitter, and no log once the cluster is gone: hence K8sJobMode, whose submitter keeps the job's log.
- Kueue admits no job that requests what its ClusterQueue does not cover, such as ephemeral-storage: the volumes on the
  node's disk are bounded by a sizeLimit each, without a request.
"""

import hashlib
import importlib.metadata
import re
import shlex
from typing import Any

from components.config.ray import GPUS, NVIDIA_GPU, PRE_RUNNING_TIMEOUT_S, RayConfig, RayJobCluster, merged
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import GROUP, VERSION, Workflow

MAX_NAME = 47  # KubeRay's limit: names of the cluster and its pods are longer (validation.go, MaxRayJobNameLength)
CONFIG_MAP = "fineloop-env"
"""Name of the ConfigMap of what is no secret: the store's endpoint and region, a shared Ray cluster's address."""
STORE_SECRET = "fineloop-s3"
"""Name of the secret with static credentials of the store; absent where a service account's role gives them."""
RAY_SECRET = "fineloop-ray"  # name of the secret with the token of Ray's clusters; a step needs it for a shared cluster
PART_OF, RUN_ID, TASK = "app.kubernetes.io/part-of", "fineloop.dev/run-id", "fineloop.dev/task"
ATTEMPT, KFP_RUN_ID, LIFETIME_S = "fineloop.dev/attempt", "fineloop.dev/kfp-run-id", "fineloop.dev/lifetime-s"
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
CA_FOLDER = "/etc/fineloop/ca"
CA_VARIABLES = {
    name: f"{CA_FOLDER}/ca.crt" for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE")
}
"""Variables that make OpenSSL, Go, requests, boto3 and libcurl trust the authorities of `ray.cluster.ca_bundle`."""
HOME = "/home/fineloop"
SUBMITTER_DISK_GIB = 1
NO_MESH = {"sidecar.istio.io/inject": "false"}
"""Label of a pod that is to get no Istio sidecar, which namespaces of a multi-user Kubeflow add to every pod: it does
not end, so the submitter would never end either, and its proxy would stand between Ray's processes."""
SUBMITTER_RETRIES = 10
"""Retries of the pod that follows the job's log; after the last KubeRay gives up the job, even a healthy one (KubeRay's
default is 2). A new pod goes on following, or starts the job again under its id where a new head does not know it."""
STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Annotations of a pod that autoscalers must not evict in order to remove a node."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Environment variable: for how long Ray drains a node at SIGTERM, in seconds."""
DRAIN_S = 60
"""Seconds that a worker pod has for a checkpoint before it ends: Ray drains its node at SIGTERM, by default for half as
long, and the workers see it within seconds. A preStop hook that stops Ray would come before that."""
HEAD_DRAIN_S = 10
"""Seconds that a head still answers before it ends; Ray's default is 30. Workers that end with it need seconds, but one
that no longer finds a head tries to reach it for DRAIN_S (ray/_private/node.py)."""
BACKOFF_LIMIT = 1
"""How often KubeRay creates a new cluster for a job that died without giving a reason: a lost head, no memory."""
TTL_S = 600
"""How long the cluster of a failed job is kept, so that its dashboard can be read; after a success it is deleted."""
ENDING_S = 15  # seconds that Ray's processes have to end after the drain, before Kubernetes kills them
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}


def rayjob(ray: RayConfig, job: Job, attempt: int, *, namespace: str, owner: Workflow | None = None) -> dict[str, Any]:
    """The whole resource. It is deleted with its owner, and at once if that is in another namespace."""
    cluster = ray.cluster
    assert isinstance(cluster, RayJobCluster)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": rayjob_name(job, attempt),
            "namespace": namespace,
            "labels": {
                **cluster.pod_labels,
                **labels(job),
                ATTEMPT: str(attempt),
                **({QUEUE: cluster.queue} if cluster.queue else {}),
                **({PRIORITY: cluster.priority_class} if cluster.queue and cluster.priority_class else {}),
            },
            "annotations": {
                RUN_ID: job.run_id,
                LIFETIME_S: str(job.lifetime_s),
                **({KFP_RUN_ID: job.kfp_run_id} if job.kfp_run_id else {}),
            },
            **({"ownerReferences": [owner.reference()]} if owner else {}),
        },
        "spec": {
            "entrypoint": shlex.join(job.command),
            "jobId": rayjob_name(job, attempt),
            "metadata": job.about,
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": _submitter(cluster, job),
            "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": TTL_S,
            # A little before ours, so that the failure says which it was.
            "activeDeadlineSeconds": max(1, int(job.timeout_s - min(60.0, job.timeout_s / 10))),
            "preRunningDeadlineSeconds": PRE_RUNNING_TIMEOUT_S,
            "backoffLimit": BACKOFF_LIMIT,
            "rayClusterSpec": {
                "rayVersion": importlib.metadata.version(
                    "ray"
                ),  # the step's, which is the image's: one lock makes both
                "authOptions": {"mode": "token", "secretName": RAY_SECRET},
                "enableInTreeAutoscaling": False,
                "headGroupSpec": _head(cluster, job),
                "workerGroupSpecs": [_workers(ray, cluster, job)],
            },
        },
    }


def rayjob_name(job: Job, attempt: int) -> str:
    """A DNS label of at most 47 characters; what does not fit or is not allowed in one is replaced by a hash."""
    plain = f"fineloop-{job.run_id}-{job.task}"
    slug = _slug(plain)
    if slug == plain and len(f"{slug}-{attempt}") <= MAX_NAME:
        return f"{slug}-{attempt}"
    digest = hashlib.sha256(plain.encode()).hexdigest()[:10]
    end = f"-{digest}-{_slug(job.task)[:10]}-{attempt}"
    return _slug(f"fineloop-{job.run_id}")[: MAX_NAME - len(end)].rstrip("-") + end


def labels(job: Job) -> dict[str, str]:
    """The labels by which all attempts at a job, and its pods, are found."""
    return {PART_OF: "fineloop", RUN_ID: label_value(job.run_id), TASK: label_value(job.task)}


def label_value(text: str) -> str:
    """The text, or a part of it and a hash where it is not a valid label value."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", text):
        return text
    return f"{text[:40].strip('._-')}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _head(cluster: RayJobCluster, job: Job) -> dict[str, Any]:
    shared_memory_gib = max(1, cluster.head.memory_gib // 4)
    container = {
        **_container("ray-head", cluster, HEAD_DRAIN_S),
        "ports": [{"name": name, "containerPort": port} for name, port in _PORTS.items()],
        "resources": _exactly({"cpu": str(min(2, cluster.worker.cpu)), "memory": f"{cluster.head.memory_gib}Gi"}),
    }
    return {
        "rayStartParams": {
            "num-cpus": "0",  # no training on the head
            "num-gpus": "0",
            "dashboard-host": "0.0.0.0",
            "object-store-memory": _object_store(shared_memory_gib, share=0.9),  # no other process uses it here
        },
        "template": _pod(cluster, job, "head", container, cluster.disk_gib, shared_memory_gib=shared_memory_gib),
    }


def _workers(ray: RayConfig, cluster: RayJobCluster, job: Job) -> dict[str, Any]:
    num_pods = cluster.pods(ray.max_workers)
    per_pod = ray.max_workers // num_pods
    gpus = {NVIDIA_GPU: str(per_pod)} if ray.use_gpu else {}
    container = {
        **_container("ray-worker", cluster, DRAIN_S),
        "resources": _exactly({"cpu": str(cluster.worker.cpu), "memory": f"{cluster.worker.memory_gib}Gi", **gpus}),
    }
    pod = _pod(cluster, job, "worker", container, cluster.disk_gib, shared_memory_gib=cluster.worker.shared_memory_gib)
    pod["spec"]["terminationGracePeriodSeconds"] = DRAIN_S + ENDING_S
    # KubeRay's init container waits for the head in a shell. As process 1 that ignores SIGTERM: a pod that is stopped
    # meanwhile would stay for all of the grace period.
    pod["spec"]["shareProcessNamespace"] = True
    if ray.use_gpu:
        pod["spec"]["tolerations"] = [{"key": NVIDIA_GPU, "operator": "Exists", "effect": "NoSchedule"}]
    pod = merged(pod, cluster.worker_template)
    if ray.use_gpu and ray.gpu:
        pod["spec"].setdefault("nodeSelector", {"nvidia.com/gpu.product": GPUS[ray.gpu].product})
    return {
        "groupName": "workers",
        "replicas": num_pods,
        "minReplicas": -(-ray.min_workers // per_pod),
        "maxReplicas": num_pods,
        "rayStartParams": {"object-store-memory": _object_store(cluster.worker.shared_memory_gib, share=0.5)},
        "template": pod,
    }


def _submitter(cluster: RayJobCluster, job: Job) -> dict[str, Any]:
    """The pod that posts the job and follows its log. It needs no S3, so it gets no credentials, and no account."""
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "env": [{"name": "HOME", "value": HOME}],
        **_confined(),
        "resources": _exactly({"cpu": "500m", "memory": "1Gi"}),
    }
    pod = _pod(cluster, job, "submitter", container, SUBMITTER_DISK_GIB)
    del pod["spec"]["serviceAccountName"]
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _pod(
    cluster: RayJobCluster,
    job: Job,
    component: str,
    container: dict[str, Any],
    disk_gib: int,
    *,
    shared_memory_gib: int = 0,
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": name, "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}} for name in ("tmp", "home")
    ]
    if shared_memory_gib:
        volumes.append({"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_gib}Gi"}})
        container["volumeMounts"].append({"name": "shared-mem", "mountPath": "/dev/shm"})
    if cluster.ca_bundle:
        volumes.append({"name": "ca", "configMap": {"name": cluster.ca_bundle}})
        container["volumeMounts"].append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
        container["env"] += [{"name": key, "value": value} for key, value in CA_VARIABLES.items()]
    template = cluster.pod_template
    if component == "submitter":  # it runs no code of a config's, and needs no variable of one
        template = {
            **template,
            "spec": {key: value for key, value in template.get("spec", {}).items() if key != "containers"},
        }
    pod = {
        "metadata": {
            "labels": {**labels(job), "app.kubernetes.io/component": f"ray-{component}", **NO_MESH},
            "annotations": dict(STAYS),
        },
        "spec": {
            "serviceAccountName": cluster.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # runAsNonRoot needs a number: the kubelet cannot check a name, as the image's USER is.
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 100,
                "fsGroup": 100,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }
    return merged(pod, template)


def _container(name: str, cluster: RayJobCluster, drain_s: int) -> dict[str, Any]:
    env = {"HOME": HOME, "PYTHONUNBUFFERED": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", DRAIN: str(drain_s)}
    env["FINELOOP_IMAGE"] = cluster.image  # the lineage names the image that trained
    return {
        "name": name,
        "image": cluster.image,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "envFrom": [{"configMapRef": {"name": CONFIG_MAP}}, {"secretRef": {"name": STORE_SECRET, "optional": True}}],
        **_confined(),
    }


def _confined() -> dict[str, Any]:
    """A container without rights, and with the only two folders that it may write to."""
    return {
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}],
    }


def _exactly(resources: dict[str, str]) -> dict[str, dict[str, str]]:
    """Requests that are also the limits: a pod that may grow takes a neighbour's memory, or dies for its own."""
    return {"requests": dict(resources), "limits": dict(resources)}


def _object_store(shared_memory_gib: int, *, share: float) -> str:
    """A share of /dev/shm in bytes: by default Ray takes 30 % of the memory, on a disk if /dev/shm is smaller."""
    return str(int(shared_memory_gib * 2**30 * share))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
