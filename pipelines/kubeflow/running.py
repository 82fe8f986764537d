"""Checks that what was applied to Kubernetes is running: the operators' deployments, and a node that accepts pods."""

from collections.abc import Iterator, Sequence

from pipelines.check import Check, check
from pipelines.kubeflow.cluster import Cluster, NotSeen, Resource

KUBEFLOW = ("workflow-controller", "ml-pipeline-persistenceagent", "ml-pipeline-scheduledworkflow")
"""Kubeflow's deployments: the first starts steps, the second reports that runs have ended, the third starts schedules'
runs."""
KUBERAY, KUEUE = "kuberay-operator", "kueue-controller-manager"


def deployments(cluster: Cluster, title: str, names: Sequence[str]) -> Iterator[Check]:
    """Check that each deployment has a ready pod, in any namespace.

    Raises:
        NotSeen: we may not list deployments in the cluster, and cannot list them, or find none, in our namespace.
    """
    wrong, fixes, absent = list[str](), list[str](), list[str]()
    for name in names:
        found = _named(cluster, name)
        if not found:
            absent.append(name)
        elif not any((each.get("status") or {}).get("availableReplicas") for each in found):
            wrong.append(f"{name} has no pod that is ready")
            fixes.append(_fix(found[0]))
    if wrong:
        yield Check(title, False, "; ".join(wrong), "; ".join(fixes))
    elif absent:
        yield Check(title, True, f"there is no deployment of the name {', '.join(absent)}", "", seen=False)
    else:
        yield Check(title, True, f"{', '.join(names)} run" if len(names) > 1 else f"{names[0]} runs", "")


def nodes(cluster: Cluster) -> Iterator[Check]:
    """Check that at least one node is ready and accepts pods.

    Raises:
        NotSeen: we may not list nodes.
    """
    found = (cluster.get("/api/v1/nodes") or {}).get("items", [])
    cordoned = [each["metadata"]["name"] for each in found if each["spec"].get("unschedulable")]
    ready = [each for each in found if _is_ready(each)]
    free = [each for each in ready if not each["spec"].get("unschedulable")]
    detail = f"{len(free)} of {len(found)} are ready and take pods"
    fix = f"kubectl uncordon {cordoned[0]}" if cordoned else "kubectl describe nodes"
    yield check("nodes", bool(free), detail, fix)


def _named(cluster: Cluster, name: str) -> list[Resource]:
    by_name = f"?fieldSelector=metadata.name%3D{name}"
    try:
        found = cluster.get(f"/apis/apps/v1/deployments{by_name}")
    except NotSeen:
        found = cluster.get(f"/apis/apps/v1/namespaces/{cluster.namespace}/deployments{by_name}")
        if not (found or {}).get("items"):
            raise
    return list((found or {}).get("items", []))


def _fix(deployment: Resource) -> str:
    name, namespace = deployment["metadata"]["name"], deployment["metadata"]["namespace"]
    if deployment["spec"].get("replicas") == 0:
        return f"kubectl -n {namespace} scale deployment {name} --replicas 1"
    return f"kubectl -n {namespace} describe deployment {name}"


def _is_ready(node: Resource) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
