"""Who may do what: rights in the Kubernetes API, roles in AWS, and what the namespace itself refuses."""

from collections.abc import Iterator
from itertools import product

from infra.checks.manifests import Manifest, of_kind, title

NAMESPACE = "fineloop"
"""Namespace of the overlays; a further team has another one."""
PROMETHEUS = "monitoring"
CLUSTER_KINDS = ("Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass")
ROLE_ARN = "eks.amazonaws.com/role-arn"
_ALL_OF_A_JOB = ("create", "delete", "get", "list", "patch", "watch")
_READ = ("get", "list", "watch")
RIGHTS = {
    "fineloop-pipeline": {
        *((verb, "ray.io/rayjobs") for verb in _ALL_OF_A_JOB),
        *((verb, "pods") for verb in _READ),
        *((verb, "pods/log") for verb in _READ),
        ("list", "argoproj.io/workflows"),
        ("watch", "argoproj.io/workflows"),
        ("list", "kueue.x-k8s.io/workloads"),
        # Argo's and Kubeflow's own.
        *((verb, "argoproj.io/workflowtaskresults") for verb in ("create", "patch")),
        ("get", "configmaps=kfp-launcher"),
        ("get", "secrets=mlpipeline-minio-artifact"),
    },
    "fineloop-reaper": {("list", "ray.io/rayjobs"), ("delete", "ray.io/rayjobs")},
    "fineloop-trainer": set(),
    "fineloop-evaluator": set(),
}
"""All that each account may do: (verb, group/resource), with =NAME where it is for one object."""
HARMLESS = {"get", "list", "watch"}
OF_PEOPLE = {
    ("create", "pods/portforward"),
    ("create", "authorization.k8s.io/localsubjectaccessreviews"),
    ("delete", "ray.io/rayjobs"),
}
"""What people may do beside reading; never run a command in a pod, nor create one, which could have any account."""


def rights(manifests: list[Manifest], account: str) -> set[tuple[str, str]]:
    """What an account may do in the Kubernetes API."""
    roles = {role["metadata"]["name"]: role["rules"] for role in of_kind(manifests, "Role", "ClusterRole")}
    bindings = of_kind(manifests, "RoleBinding", "ClusterRoleBinding")
    bound = [b["roleRef"]["name"] for b in bindings if any(s["name"] == account for s in b["subjects"])]
    unknown = {"verbs": ["?"], "apiGroups": ["?"]}
    return {each for role in bound for each in _granted(roles.get(role, [{**unknown, "resources": [role]}]))}


def _granted(rules: list[dict[str, list[str]]]) -> Iterator[tuple[str, str]]:
    """Each verb with what it is for."""
    for rule in rules:
        for verb, group, resource in product(rule["verbs"], rule["apiGroups"], rule["resources"]):
            for name in rule.get("resourceNames", [""]):
                yield verb, f"{group}/{resource}{'=' * bool(name)}{name}".lstrip("/")


def accounts_have_their_rights_and_no_other(manifests: list[Manifest]) -> Iterator[str]:
    """The whole of each account's rights, written down: a new one is a decision."""
    for account, expected in RIGHTS.items():
        found = rights(manifests, account)
        for verb, what in sorted(found - expected):
            yield f"{account}: may {verb} {what}"
        for verb, what in sorted(expected - found):
            yield f"{account}: may not {verb} {what}"


def people_read_no_secret(manifests: list[Manifest]) -> Iterator[str]:
    """A role that no account is bound to is for people."""
    bound = {binding["roleRef"]["name"] for binding in of_kind(manifests, "RoleBinding", "ClusterRoleBinding")}
    for role in of_kind(manifests, "Role"):
        if role["metadata"]["name"] in bound:
            continue
        for verb, what in _granted(role["rules"]):
            if what.startswith("secrets") or (verb not in HARMLESS and (verb, what) not in OF_PEOPLE):
                yield f"{title(role)}: may {verb} {what}"


def namespace_of(manifests: list[Manifest]) -> str:
    """The one that they make, else the overlays'."""
    return next((found["metadata"]["name"] for found in of_kind(manifests, "Namespace")), NAMESPACE)


def rights_end_at_the_namespace(manifests: list[Manifest]) -> Iterator[str]:
    """No wildcard, no right in the whole cluster, and nobody of another namespace."""
    for manifest in of_kind(manifests, "ClusterRole", "ClusterRoleBinding"):
        yield f"{title(manifest)}: holds in every namespace"
    for role in of_kind(manifests, "Role"):
        for rule in role["rules"]:
            if "*" in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]:
                yield f"{title(role)}: has a wildcard"
    accounts = {account["metadata"]["name"] for account in of_kind(manifests, "ServiceAccount")}
    namespace = namespace_of(manifests)
    for binding in of_kind(manifests, "RoleBinding"):
        for subject in binding["subjects"]:
            ours = subject["kind"] == "ServiceAccount" and subject.get("namespace") == namespace
            if not ours or subject["name"] not in accounts:
                yield f"{title(binding)}: binds {subject['kind']} {subject['name']}, which is no account of ours"


def everything_is_in_the_namespace(manifests: list[Manifest]) -> Iterator[str]:
    """An object without a namespace lands wherever kubectl happens to point. What watches lies where Prometheus is."""
    for manifest in manifests:
        found = manifest["metadata"].get("namespace")
        if found != _place(manifest, namespace_of(manifests)):
            yield f"{title(manifest)}: namespace is {found}"


def _place(manifest: Manifest, namespace: str) -> str | None:
    if manifest["kind"] in CLUSTER_KINDS:
        return None
    is_dashboard = "grafana_dashboard" in manifest["metadata"].get("labels", {})
    is_watching = is_dashboard or manifest.get("apiVersion", "").startswith("monitoring.coreos.com/")
    return PROMETHEUS if is_watching else namespace


def the_namespace_is_restricted(manifests: list[Manifest]) -> Iterator[str]:
    """The API server enforces what the policies ask, also for pods that nobody here wrote."""
    for namespace in of_kind(manifests, "Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{title(namespace)}: set the label pod-security.kubernetes.io/enforce to restricted"
    for kind in ("Namespace", "ResourceQuota", "LimitRange"):
        if not list(of_kind(manifests, kind)):
            yield f"no {kind}"


def the_quota_closes_the_ways_out(manifests: list[Manifest]) -> Iterator[str]:
    """GPUs are counted, and no Service may put the dashboard on a node's port or on a load balancer."""
    for quota in of_kind(manifests, "ResourceQuota"):
        hard = quota["spec"]["hard"]
        for resource in ("requests.cpu", "requests.memory", "requests.nvidia.com/gpu", "pods", "count/rayjobs.ray.io"):
            if resource not in hard:
                yield f"{title(quota)}: does not count {resource}"
        for service in ("services.loadbalancers", "services.nodeports"):
            if hard.get(service) != "0":
                yield f"{title(quota)}: set {service} to 0"


def services_stay_inside(manifests: list[Manifest]) -> Iterator[str]:
    """Nothing is published: people come through `kubectl port-forward`, which asks who they are."""
    for service in of_kind(manifests, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"{title(service)}: type {service['spec']['type']}"
    for manifest in of_kind(manifests, "Ingress"):
        yield f"{title(manifest)}: publishes a service"


def promoting_takes_another_role_than_training(manifests: list[Manifest]) -> Iterator[str]:
    """On AWS: the trainer's role can write neither an alias nor an evaluation, so no account may hold that and another,
    and no key lies in the cluster."""
    roles = {
        account["metadata"]["name"]: account["metadata"].get("annotations", {}).get(ROLE_ARN)
        for account in of_kind(manifests, "ServiceAccount")
    }
    if not any(roles.values()):
        return
    for account in ("fineloop-pipeline", "fineloop-evaluator", "fineloop-trainer", "fineloop-experiments"):
        if not roles.get(account):
            yield f"{account}: has no role"
    if roles.get("fineloop-pipeline") == roles.get("fineloop-trainer"):
        yield "fineloop-trainer: has the promoter's role"
    for account in roles.keys() - {"fineloop-pipeline", "fineloop-trainer"}:
        if roles[account] == roles.get("fineloop-pipeline"):
            yield f"{account}: has the promoter's role"
    for account in roles.keys() - {"fineloop-evaluator"}:
        if roles[account] and roles[account] == roles.get("fineloop-evaluator"):
            yield f"{account}: has the evaluator's role"
