"""The ends of every connection in the cluster, and the table of who may reach whom."""

from infra.checks.manifests import Manifest
from tests.infra.reach import End, address, reaches

RAY = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", "app.kubernetes.io/part-of": "fineloop"}
"""KubeRay puts the first two on each of its pods."""
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
STEP = {"pipelines.kubeflow.org/v2_component": "true", "workflows.argoproj.io/workflow": "fineloop-retrain-x7"}
SERVER = {"application-crd-id": "kubeflow-pipelines", "app": "ml-pipeline"}

ENDS = {
    end.name: end
    for end in (
        End("head", RAY | {"ray.io/node-type": "head", "ray.io/cluster": "one"}),
        End("worker", RAY | {"ray.io/node-type": "worker", "ray.io/cluster": "one"}),
        End("experiments", RAY | {"ray.io/node-type": "head", "fineloop.dev/autoscaler": "true"}),
        End("submitter", {"app.kubernetes.io/component": "ray-submitter", "app.kubernetes.io/part-of": "fineloop"}),
        End("step", STEP),
        End("reap", {"app.kubernetes.io/name": "fineloop-reap", "app.kubernetes.io/part-of": "fineloop"}),
        End("kubeflow", SERVER),
        End("kubeflow elsewhere", SERVER, namespace="kubeflow"),
        End("model registry", {"component": "model-registry-server"}, namespace="kubeflow"),
        End("s3", {"app.kubernetes.io/name": "fineloop-s3", "app.kubernetes.io/part-of": "fineloop"}),
        End("operator", OPERATOR, namespace="ray-system"),
        End("prometheus", {"app.kubernetes.io/name": "prometheus"}, namespace="monitoring"),
        End("neighbour", {"app": "notebook"}),
        End("stranger", {"app": "web"}, namespace="default"),
        End("stranger with our labels", RAY | STEP | SERVER, namespace="default"),
        End("stranger with the operator's labels", OPERATOR, namespace="default"),
        End("another pod beside the operator", {"app": "web"}, namespace="ray-system"),
    )
}
RAY_PODS = {"head", "worker", "experiments"}
JOBS_API = RAY_PODS | {"step", "submitter", "operator"}
OUTSIDE = {
    "metadata server": address("metadata server", "169.254.169.254"),
    # docs.aws.amazon.com/eks/latest/userguide/pod-id-agent-setup.html
    "pod identity agent": address("pod identity agent", "169.254.170.23"),
    "internet": address("internet", "52.216.8.21"),
    "Kubernetes API": address("Kubernetes API", "10.96.0.1"),
    "private network": address("private network", "192.168.7.7"),
}

TO_PODS = [
    ("head", 8265, JOBS_API),
    ("head", 6379, RAY_PODS),
    ("head", 10001, RAY_PODS),
    ("worker", 8265, JOBS_API),
    ("worker", 10002, RAY_PODS),
    ("experiments", 8265, JOBS_API),
    ("experiments", 6379, RAY_PODS),
    ("head", 8080, RAY_PODS | {"prometheus"}),
    ("kubeflow", 8888, {"kubeflow", "step", "reap"}),
    ("kubeflow", 8887, {"kubeflow", "step"}),
    ("kubeflow", 3306, {"kubeflow"}),
    ("kubeflow", 9090, {"kubeflow", "prometheus"}),
    ("kubeflow elsewhere", 8888, {"step", "reap"}),
    ("kubeflow elsewhere", 3306, set()),
    ("model registry", 8080, {"step"}),
    ("step", 8080, set()),
    ("reap", 8080, set()),
    ("neighbour", 8888, set()),
]
TO_OUTSIDE = [
    ("metadata server", 80, set()),
    ("metadata server", 443, set()),
    ("pod identity agent", 80, RAY_PODS | {"step"}),
    ("pod identity agent", 443, set()),
    ("internet", 443, RAY_PODS | {"step", "reap", "kubeflow"}),
    ("internet", 22, set()),
    ("Kubernetes API", 443, {"experiments", "step", "reap", "kubeflow"}),
    ("Kubernetes API", 6443, {"experiments", "step", "reap", "kubeflow"}),
    ("private network", 5432, set()),
]


TO_OUR_PODS = [line for line in TO_PODS if ENDS[line[0]].namespace == "fineloop"]


def who_reaches(manifests: list[Manifest], target: End, port: int) -> set[str]:
    return {name for name, end in ENDS.items() if name != target.name and reaches(manifests, end, target, port)}


def of_ours(names: set[str]) -> set[str]:
    """Pods of other namespaces leave by their own rules, which are not ours to judge."""
    return {name for name in names if ENDS[name].namespace == "fineloop"}
