"""RayJobs as `fineloop` creates them."""

from typing import Any

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import Workflow
from components.ray_cluster.rayjob_manifest import rayjob
from infra.checks.manifests import Manifest

JOB = Job(run_id="night-7", task="finetune", command=("python", "-m", "ray_jobs.finetune"), timeout_s=3600)
IMAGE = f"registry.example/train@sha256:{'1' * 64}"
CLUSTER = {"kind": "rayjob", "image": IMAGE, "priority_class": "fineloop-scheduled"}
GPUS = RayConfig.model_validate({"num_workers": 4, "use_gpu": True, "gpu": "A10G", "cluster": CLUSTER})
CONFIGS = {
    "gpus": {"num_workers": 2, "use_gpu": True, "gpu": "A10G"},
    "cpus": {"num_workers": 2},
    "spot": {"num_workers": 4, "use_gpu": True, "cluster": {"nodes": 2, "spot": True}},
    "data": GPUS.for_data().model_dump(exclude_defaults=True),
}
COMPANY = {
    "num_workers": 2,
    "use_gpu": True,
    "cluster": {
        "worker": {"resources": {"vpc.amazonaws.com/efa": "1", "hugepages-2Mi": "5Gi"}},
        "topology": "topology.kubernetes.io/zone",
        "pod_priority_class": "training",
        "labels": {"cost-centre": "nlp-7"},
        "ca_bundle": "company-ca",
    },
}
"""What no overlay of ours has."""


def created(config: dict[str, Any], owner: Workflow | None = None) -> Manifest:
    ray = RayConfig.model_validate(config | {"cluster": CLUSTER | config.get("cluster", {})})
    return rayjob(ray, JOB, 1, namespace="fineloop", owner=owner)
