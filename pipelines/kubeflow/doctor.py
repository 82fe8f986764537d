"""Whether a cluster can run a config: `fineloop doctor --host URL`. It answers what a run would only find out late.

It reads, and has the API server judge a RayJob and a step's pod without making them (dryRun). With an image it also
starts pods in the place of a step or a worker, one after the other, which try the store and each MLflow that the config
names, and deletes them again.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RunConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.rayjob_manifest import CONFIG_MAP, RAY_SECRET, STORE_SECRET, rayjob
from components.shared.errors import FineloopError
from components.step.kfp import IMAGE
from pipelines.check import IN_MESSAGE, Check, check
from pipelines.kubeflow import probe, running
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.cluster import Cluster, NotSeen, Refused, Resource
from pipelines.kubeflow.task_settings import REPORT_SECRET

# Resources that a config's Ray job requests from Kueue, and whether a ClusterQueue can ever grant them.

Resources = Mapping[str, Decimal]


def demand(ray: RayConfig) -> Resources:
    """Return the sum of the requests of head, workers and submitter, which Kueue admits together."""
    from kubernetes.utils.quantity import parse_quantity

    spec = rayjob(ray, Job("quota", "finetune", ("true",), 60.0), 1, namespace="any")["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [(1, cluster["headGroupSpec"]["template"]), (1, spec["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    total: dict[str, Decimal] = {}
    for count, template in pods:
        for container in template["spec"]["containers"]:
            for name, quantity in container["resources"]["requests"].items():
                total[name] = total.get(name, Decimal(0)) + count * parse_quantity(quantity)
    return total


def lacking(wanted: Resources, cluster_queue: Mapping[str, Any]) -> list[str]:
    """Return why the queue can never grant this, in words: resources that it does not cover, or too small a quota."""
    from kubernetes.utils.quantity import parse_quantity

    room: dict[str, Decimal] = {}
    for name, quota, borrowed in _quotas(cluster_queue):
        room[name] = max(room.get(name, Decimal(0)), parse_quantity(quota) + parse_quantity(borrowed))
    return [
        f"{name}: {_formatted(need)} asked for, at most {_formatted(room[name])} given"
        if name in room
        else f"{name}: not covered by the queue"
        for name, need in wanted.items()
        if need > room.get(name, Decimal(-1))
    ]


def _quotas(cluster_queue: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    in_cohort = bool(cluster_queue["spec"].get("cohortName"))
    for group in cluster_queue["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            for resource in flavor["resources"]:
                unlimited = "1Ei" if in_cohort else "0"  # without a limit it may borrow all that its cohort has
                yield resource["name"], str(resource["nominalQuota"]), str(resource.get("borrowingLimit", unlimited))


def _formatted(quantity: Decimal) -> str:
    gib = quantity / 2**30
    return f"{gib:.0f} GiB" if gib >= 1 else f"{quantity.normalize():f}"


RIGHTS = {
    ("ray.io", "rayjobs"): ("create", "get", "list", "watch", "patch", "delete"),
    ("", "pods"): ("get", "list", "watch"),
    ("", "pods/log"): ("get",),
    ("kueue.x-k8s.io", "workloads"): ("list",),
    ("argoproj.io", "workflows"): ("list", "watch"),
    ("argoproj.io", "workflowtaskresults"): ("create", "patch"),
}
"""What the account of the steps does, as infra/rbac/pipeline.yaml grants it."""
LAUNCHER = "configmaps/kfp-launcher"
ENVIRONMENTS = {
    f"configmaps/{CONFIG_MAP}": "AWS_REGION",
    LAUNCHER: "providers",
    f"secrets/{RAY_SECRET}": "auth_token",
    f"secrets/{STORE_SECRET}": "AWS_ACCESS_KEY_ID",
}
"""The objects that pods take their environment from, and a key that each must have."""
REFUSALS = {
    "failed calling webhook": "start what answers it: kubectl get deployments --all-namespaces",
    "violates PodSecurity": "kubectl apply -k infra/namespace",
    "exceeded quota": "raise it in infra/namespace/limits.yaml, or wait",
    "unknown field": "infra/README.md has the versions that fit",
}
"""What mends a refusal, by words of it."""
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
KUBERAY = "/apis/ray.io/v1"


def cluster_checks(
    config: RunConfig,
    environment: Mapping[str, str],
    *,
    host: str,
    namespace: str,
    service_account: str,
    image: str,
) -> Iterator[Check]:
    """Look at Kubeflow Pipelines and at the Kubernetes namespace where the runs live, in the order of a run."""
    kubeflow, has_many_users = _kubeflow(environment, host, namespace)
    yield kubeflow
    try:
        cluster = Cluster(namespace or environment.get("KFP_NAMESPACE", ""))
        version = cluster.get("/version")
    except (FineloopError, NotSeen) as exc:
        yield Check("kubernetes", False, str(exc), IN_MESSAGE)
        return
    yield Check("kubernetes", True, f"{(version or {}).get('gitVersion', 'unknown version')} at {cluster.address}", "")
    try:
        found = cluster.get(_in(cluster, "").rstrip("/"))
    except NotSeen:
        found = {}  # a person of one namespace may not read the namespace itself
    if found is None:
        yield Check("namespace", False, f"there is no {cluster.namespace}", "kubectl apply -k infra/namespace")
        return
    yield Check("namespace", True, f"{cluster.namespace}{_pod_security(found)}", "")
    ray = config.ray.cluster
    accounts = [service_account, *([ray.service_account] if isinstance(ray, RayJobCluster) else [])]
    if isinstance(ray, RayJobCluster) and config.registry.trusted_keys:
        accounts.append(ray.evaluation_service_account)
    environments = {**ENVIRONMENTS}
    if has_many_users:  # its profile controller makes this one, and needs no providers
        del environments[LAUNCHER]
    for name, ask in (
        ("kubeflow's controllers", running.deployments(cluster, "kubeflow's controllers", running.KUBEFLOW)),
        ("nodes", running.nodes(cluster)),
        *((f"account {account}", _account(cluster, account)) for account in accounts if account),
        ("rights of the steps", _rights(cluster, service_account)),
        *((name, _environment(cluster, name, key)) for name, key in environments.items()),
        ("openlineage", _open_lineage(cluster)),
        *_ray(cluster, config),
        ("a step's pod", _dry_pod(cluster, service_account, image)),
    ):
        yield _asked(name, ask)
    for question in probe.questions(config) if image else ():
        yield _asked(question.title, _probed(cluster, question, service_account, image))


def _asked(name: str, ask: Iterator[Check]) -> Check:
    """The one finding of a question, or that it could not be asked."""
    try:
        return next(ask)
    except NotSeen as exc:
        return Check(name, True, f"not seen: {exc}", "", seen=False)


def _kubeflow(environment: Mapping[str, str], host: str, namespace: str) -> tuple[Check, bool]:
    """The finding, and whether the server has a namespace for each user."""
    try:
        kubeflow = connect(environment, host=host, namespace=namespace)
    except FineloopError as exc:
        return Check("kubeflow pipelines", False, str(exc), IN_MESSAGE), False
    users = f"many users, yours is {kubeflow.namespace}" if kubeflow.namespace else "one namespace for all"
    return Check("kubeflow pipelines", True, f"{kubeflow.host} answers: {users}", ""), bool(kubeflow.namespace)


def _pod_security(namespace: Resource) -> str:
    labels = namespace.get("metadata", {}).get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce")
    return f", which admits {level} pods" if level else ""


def _account(cluster: Cluster, account: str) -> Iterator[Check]:
    found = cluster.get(_in(cluster, f"serviceaccounts/{account}"))
    detail = "is there" if found else f"{cluster.namespace} has no such service account"
    yield check(f"account {account}", found is not None, detail, "kubectl apply -k infra/rbac")


def _rights(cluster: Cluster, account: str) -> Iterator[Check]:
    """Asked for the account, not for us: a LocalSubjectAccessReview, which takes rights of its own."""
    user = f"system:serviceaccount:{cluster.namespace}:{account or 'default'}"
    path = f"/apis/authorization.k8s.io/v1/namespaces/{cluster.namespace}/localsubjectaccessreviews"
    missing = []
    for (group, resource), verbs in RIGHTS.items():
        kind, _, part = resource.partition("/")
        for verb in verbs:
            wanted = {"namespace": cluster.namespace, "group": group, "resource": kind, "subresource": part}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "LocalSubjectAccessReview",
                "metadata": {"namespace": cluster.namespace},
                "spec": {"user": user, "resourceAttributes": {**wanted, "verb": verb}},
            }
            if not cluster.create(path, review).get("status", {}).get("allowed"):
                missing.append(f"{verb} {resource}")
    detail = f"{user} may not {', '.join(missing)}" if missing else "all that a run asks for"
    yield check("rights of the steps", not missing, detail, "kubectl apply -k infra/rbac")


def _environment(cluster: Cluster, name: str, key: str) -> Iterator[Check]:
    found = cluster.get(_in(cluster, name))
    kind, _, object_name = name.partition("/")
    if found is None and object_name == STORE_SECRET:
        yield Check(name, True, "absent: right where the service account's role gives access to the store", "")
        return
    has_key = key in ((found or {}).get("data") or {})
    detail = f"has {key}" if has_key else f"has no key {key}" if found else f"{cluster.namespace} has none"
    fix = f"make the {kind[:-1]} {object_name} as infra/README.md says"
    yield check(name, has_key, detail, fix)


def _open_lineage(cluster: Cluster) -> Iterator[Check]:
    """Whether a server gets events of runs, and with which key; without TLS anyone could read the key."""
    found = cluster.get(_in(cluster, f"configmaps/{CONFIG_MAP}")) or {}
    url = (found.get("data") or {}).get("OPENLINEAGE_URL", "")
    secret = (cluster.get(_in(cluster, f"secrets/{REPORT_SECRET}")) or {}) if url else {}
    has_key = "OPENLINEAGE_API_KEY" in (secret.get("data") or {})
    detail = f"{url}, {'with' if has_key else 'without'} the key of secret {REPORT_SECRET}" if url else "not configured"
    fix = f"set an https:// address as OPENLINEAGE_URL in the config map {CONFIG_MAP}, or delete the secret's key"
    yield check("openlineage", not (has_key and url.startswith("http://")), detail, fix)


def _ray(cluster: Cluster, config: RunConfig) -> Iterator[tuple[str, Iterator[Check]]]:
    ray = config.ray.cluster
    if ray.has_address:
        yield "ray address", _shared_ray(cluster)
    if not isinstance(ray, RayJobCluster):
        return
    yield "kuberay", _kind(cluster, "kuberay", KUBERAY, "rayjobs", "install KubeRay: infra/README.md")
    yield "kuberay's operator", running.deployments(cluster, "kuberay's operator", [running.KUBERAY])
    yield "a RayJob of this config", _dry_rayjob(cluster, config)
    if ray.queue:
        yield "kueue", _kind(cluster, "kueue", KUEUE, "localqueues", "install Kueue, or leave ray.cluster.queue empty")
        yield "kueue's manager", running.deployments(cluster, "kueue's manager", [running.KUEUE])
        yield "queue", _queue(cluster, config, ray.queue)
        if ray.priority_class:
            yield "priority", _priority(cluster, ray.priority_class)


def _shared_ray(cluster: Cluster) -> Iterator[Check]:
    found = cluster.get(_in(cluster, f"configmaps/{CONFIG_MAP}")) or {}
    address = (found.get("data") or {}).get("RAY_ADDRESS", "")
    fix = f"set RAY_ADDRESS in the config map {CONFIG_MAP}, or ray.cluster.kind = 'rayjob' in the config"
    yield check("ray address", bool(address), address or "no RAY_ADDRESS for the steps", fix)


def _kind(cluster: Cluster, name: str, path: str, resource: str, fix: str) -> Iterator[Check]:
    found = cluster.get(path) or {}
    is_there = any(each.get("name") == resource for each in found.get("resources", []))
    served = path.removeprefix("/apis/")
    yield check(name, is_there, f"{served} is {'' if is_there else 'not '}served", fix)


def _dry_rayjob(cluster: Cluster, config: RunConfig) -> Iterator[Check]:
    wanted = rayjob(config.ray, Job("doctor", "finetune", ("true",), 60.0), 1, namespace=cluster.namespace)
    path = f"{KUBERAY}/namespaces/{cluster.namespace}/rayjobs?dryRun=All&fieldValidation=Strict"
    yield _dry(cluster, "a RayJob of this config", path, wanted)


def _dry_pod(cluster: Cluster, account: str, image: str) -> Iterator[Check]:
    pod = probe.pod(cluster.namespace, account, image or IMAGE, "")
    yield _dry(cluster, "a step's pod", f"{_in(cluster, 'pods')}?dryRun=All", pod)


def _dry(cluster: Cluster, name: str, path: str, body: Resource) -> Check:
    try:
        cluster.create(path, body)
    except Refused as exc:
        fix = next((fix for words, fix in REFUSALS.items() if words in str(exc)), IN_MESSAGE)
        return Check(name, False, f"refused: {exc}", fix)
    return Check(name, True, "the API server would take it", "")


def _queue(cluster: Cluster, config: RunConfig, queue: str) -> Iterator[Check]:
    local = cluster.get(f"{KUEUE}/namespaces/{cluster.namespace}/localqueues/{queue}")
    if local is None:
        detail = f"{cluster.namespace} has no LocalQueue {queue}"
        yield Check("queue", False, detail, "kubectl apply -k infra/kueue, or name yours in ray.cluster.queue")
        return
    name = local["spec"]["clusterQueue"]
    whole = cluster.get(f"{KUEUE}/clusterqueues/{name}")
    if whole is None:
        yield Check("queue", False, f"{queue} belongs to ClusterQueue {name}, which is not there", "create it")
        return
    inactive = [
        condition["message"]
        for condition in whole.get("status", {}).get("conditions", [])
        if condition["type"] == "Active" and condition["status"] != "True"
    ]
    if inactive or whole["spec"].get("stopPolicy", "None") != "None":
        yield Check(
            "queue", False, f"ClusterQueue {name} admits no job: {'; '.join(inactive) or 'stopped'}", "start it"
        )
        return
    jobs, keys = [config.ray], "ray.num_workers, ray.cluster.worker"
    if config.data.engine == "ray":
        jobs, keys = [*jobs, config.ray.for_data(timeout_s=config.data.timeout_s)], f"{keys}, ray.cluster.data"
    short = list(dict.fromkeys(lack for job in jobs for lack in lacking(demand(job), whole)))
    fix = f"raise the quota of ClusterQueue {name}, or ask for less: {keys}"
    yield check("queue", not short, "; ".join(short) or f"{queue} in {name} has room for this config", fix)


def _priority(cluster: Cluster, priority_class: str) -> Iterator[Check]:
    found = cluster.get(f"{KUEUE}/workloadpriorityclasses/{priority_class}")
    detail = "is there" if found else "the cluster has none of that name"
    yield check(f"priority {priority_class}", found is not None, detail, "kubectl apply -k infra/kueue")


def _probed(cluster: Cluster, question: probe.Question, account: str, image: str) -> Iterator[Check]:
    yield probe.run(cluster, question, account, image)


def _in(cluster: Cluster, what: str) -> str:
    return f"/api/v1/namespaces/{cluster.namespace}/{what}"
