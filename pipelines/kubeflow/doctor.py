"""Whether a cluster can run a config: `fineloop doctor --host URL`. It answers what a run would only find out late.

It reads, and has the API server judge a RayJob and a step's pod without making them (dryRun). With an image it also
starts pods in the place of a step or a worker, one after the other, which try the store and each MLflow that the config
names, and deletes them again.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RunConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import CALL_S, configuration
from components.ray_cluster.rayjob_manifest import CONFIG_MAP, NO_MESH, PART_OF, RAY_SECRET, STORE_SECRET, rayjob
from components.shared.errors import FineloopError, UserError
from components.step.step import IMAGE
from pipelines.check import IN_MESSAGE, Check, check
from pipelines.kubeflow.client import connect
from pipelines.step_secrets import of_its_own

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
KUBEFLOW_CONTROLLERS = ("workflow-controller", "ml-pipeline-persistenceagent", "ml-pipeline-scheduledworkflow")
"""Kubeflow's deployments: the first starts steps, the second reports that runs have ended, the third starts schedules'
runs."""
KUBERAY_OPERATOR, KUEUE_MANAGER = "kuberay-operator", "kueue-controller-manager"


# Access to a Kubernetes cluster: objects, kinds and rights, as plain JSON.

Resource = dict[str, Any]
Finding = tuple[bool, str, str]
"""Whether it is right, what was seen, and what mends it."""
_NO_RIGHT = re.compile(r"cannot \w+ resource")
"""Wording of RBAC's refusals, to tell them from those of pod security and quotas, which are 403 too."""


class NotSeen(Exception):
    """The API server does not permit the request, or cannot be reached; the text says which."""


class Refused(NotSeen):
    """The API server rejected the object that it was asked to create."""


class Cluster:
    """Client of the API server that the pod's service account or the kubeconfig names."""

    def __init__(self, namespace: str = "") -> None:
        """Connect; an empty `namespace` means the kubeconfig context's.

        Raises:
            UserError: no API server is configured, or no namespace.
        """
        from kubernetes import client

        configured, context_namespace = configuration()
        configured.retries = False
        self.address = configured.host
        self.namespace = namespace or context_namespace
        if not self.namespace:
            raise UserError("the kubeconfig's context has no namespace: name the one of your runs with --namespace")
        self._api = client.ApiClient(configured)

    def path(self, what: str) -> str:
        """The path of something in the namespace, such as pods/NAME."""
        return f"/api/v1/namespaces/{self.namespace}/{what}"

    def data(self, what: str) -> Mapping[str, str]:
        """Return the data of a ConfigMap or Secret; empty if there is none."""
        return (self.get(self.path(what)) or {}).get("data") or {}

    def get(self, path: str) -> Resource | None:
        """Return the object at a path of the API; None if there is none.

        Raises:
            NotSeen: we may not read it, or the server does not answer.
        """
        return self._ask("GET", path)

    def create(self, path: str, body: Resource) -> Resource:
        """Create an object and return the API server's response, such as the result of an access review.

        Raises:
            Refused: the server, or an admission webhook, rejects the object.
            NotSeen: we may not create it, or the server does not answer.
        """
        return self._ask("POST", path, body) or {}

    def delete(self, path: str) -> None:
        """Delete an object if it exists.

        Raises:
            NotSeen: we may not delete it, or the server does not answer.
        """
        self._ask("DELETE", path)

    def log(self, pod: str) -> str:
        return str(self._ask("GET", self.path(f"pods/{pod}/log"), raw=True) or "")

    def _ask(self, method: str, path: str, body: Resource | None = None, *, raw: bool = False) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "*/*" if raw else "application/json", "Content-Type": "application/json"}
        try:
            response = self._api.call_api(
                path,
                method,
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=CALL_S,
            )
        except ApiException as exc:
            if exc.status == 404:
                return None
            reason = _reason(exc)
            is_ours = exc.status in (401, 403) and (exc.status == 401 or _NO_RIGHT.search(reason))
            raise (Refused if method == "POST" and not is_ours else NotSeen)(reason) from exc
        except (HTTPError, OSError) as exc:
            raise NotSeen(f"{self.address} does not answer: {exc}") from exc
        text = response.data.decode("utf-8", errors="replace")
        return text if raw else json.loads(text)


def _reason(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"refused with {error.status}"


@dataclass(frozen=True)
class Question:
    """What one pod tries, and how the answer is told."""

    title: str
    script: str
    labels: Mapping[str, str]
    """Labels of the pods that it stands for."""
    yes: str
    fix: str


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
    has_many_users = False
    try:
        kubeflow = connect(environment, host=host, namespace=namespace)
        has_many_users = bool(kubeflow.namespace)
        users = f"many users, yours is {kubeflow.namespace}" if has_many_users else "one namespace for all"
        yield Check("kubeflow pipelines", True, f"{kubeflow.host} answers: {users}", "")
    except FineloopError as exc:
        yield Check("kubeflow pipelines", False, str(exc), IN_MESSAGE)
    try:
        cluster = Cluster(namespace or environment.get("KFP_NAMESPACE", ""))
        version = cluster.get("/version") or {}
    except (FineloopError, NotSeen) as exc:
        yield Check("kubernetes", False, str(exc), IN_MESSAGE)
        return
    yield Check("kubernetes", True, f"{version.get('gitVersion', 'unknown version')} at {cluster.address}", "")
    try:
        found = cluster.get(cluster.path("").rstrip("/"))
    except NotSeen:
        found = {}  # a person of one namespace may not read the namespace itself
    if found is None:
        yield Check("namespace", False, f"there is no {cluster.namespace}", "kubectl apply -k infra/namespace")
        return
    level = (found.get("metadata", {}).get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    yield Check("namespace", True, f"{cluster.namespace}{f', which admits {level} pods' if level else ''}", "")
    accounts = [service_account, *config.ray.cluster.accounts[: 2 if config.registry.trusted_keys else 1]]
    # In a namespace of a user the profile controller makes the launcher's config, which needs no providers there.
    environments = {name: key for name, key in ENVIRONMENTS.items() if not (has_many_users and name == LAUNCHER)}
    checks: dict[str, Callable[[], Finding]] = {
        "kubeflow's controllers": partial(_deployments, cluster, *KUBEFLOW_CONTROLLERS),
        "nodes": partial(_nodes, cluster),
        **{f"account {name}": partial(_account, cluster, name) for name in accounts if name},
        "rights of the steps": partial(_rights, cluster, service_account),
        **{name: partial(_environment, cluster, name, key) for name, key in environments.items()},
        "openlineage": partial(_open_lineage, cluster),
        **({"ray address": partial(_ray_address, cluster)} if config.ray.cluster.has_address else {}),
        **RAY_CHECKS.get(config.ray.cluster.kind, lambda *_: {})(cluster, config),
        "a step's pod": partial(
            _dry, cluster, "pods?dryRun=All", probe_pod(cluster, service_account, image or IMAGE, "")
        ),
        **{
            question.title: partial(run_probe, cluster, question, service_account, image)
            for question in (probe_questions(config) if image else ())
        },
    }
    for name, ask in checks.items():
        try:
            yield check(name, *ask())
        except NotSeen as exc:
            yield Check(name, True, f"not seen: {exc}", "", seen=False)


def _account(cluster: Cluster, account: str) -> Finding:
    found = cluster.get(cluster.path(f"serviceaccounts/{account}"))
    detail = "is there" if found else f"{cluster.namespace} has no such service account"
    return found is not None, detail, "kubectl apply -k infra/rbac"


def _rights(cluster: Cluster, account: str) -> Finding:
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
    return not missing, detail, "kubectl apply -k infra/rbac"


def _environment(cluster: Cluster, name: str, key: str) -> Finding:
    found = cluster.get(cluster.path(name))
    kind, _, object_name = name.partition("/")
    if found is None and object_name == STORE_SECRET:
        return True, "absent: right where the service account's role gives access to the store", ""
    has_key = key in ((found or {}).get("data") or {})
    detail = f"has {key}" if has_key else f"has no key {key}" if found else f"{cluster.namespace} has none"
    return has_key, detail, f"make the {kind[:-1]} {object_name} as infra/README.md says"


def _open_lineage(cluster: Cluster) -> Finding:
    """Whether a server gets events of runs, and with which key; without TLS anyone could read the key."""
    url = cluster.data(f"configmaps/{CONFIG_MAP}").get("OPENLINEAGE_URL", "")
    name = of_its_own()["report"].kubernetes
    has_key = bool(url) and "OPENLINEAGE_API_KEY" in cluster.data(f"secrets/{name}")
    detail = f"{url}, {'with' if has_key else 'without'} the key of secret {name}" if url else "not configured"
    fix = f"set an https:// address as OPENLINEAGE_URL in the config map {CONFIG_MAP}, or delete the secret's key"
    return not (has_key and url.startswith("http://")), detail, fix


def _ray_address(cluster: Cluster) -> Finding:
    address = cluster.data(f"configmaps/{CONFIG_MAP}").get("RAY_ADDRESS", "")
    fix = f"set RAY_ADDRESS in the config map {CONFIG_MAP}, or ray.cluster.kind = 'rayjob' in the config"
    return bool(address), address or "no RAY_ADDRESS for the steps", fix


def _rayjob_checks(cluster: Cluster, config: RunConfig) -> dict[str, Callable[[], Finding]]:
    ray = config.ray.cluster
    assert isinstance(ray, RayJobCluster)
    wanted = rayjob(config.ray, Job("doctor", "finetune", ("true",), 60.0), 1, namespace=cluster.namespace)
    path = f"{KUBERAY}/namespaces/{cluster.namespace}/rayjobs?dryRun=All&fieldValidation=Strict"
    checks: dict[str, Callable[[], Finding]] = {
        "kuberay": partial(_kind, cluster, KUBERAY, "rayjobs", "install KubeRay: infra/README.md"),
        "kuberay's operator": partial(_deployments, cluster, KUBERAY_OPERATOR),
        "a RayJob of this config": partial(_dry, cluster, path, wanted),
    }
    if ray.queue:
        checks["kueue"] = partial(
            _kind, cluster, KUEUE, "localqueues", "install Kueue, or leave ray.cluster.queue empty"
        )
        checks["kueue's manager"] = partial(_deployments, cluster, KUEUE_MANAGER)
        checks["queue"] = partial(_queue, cluster, config, ray.queue)
        if ray.priority_class:
            checks[f"priority {ray.priority_class}"] = partial(_priority, cluster, ray.priority_class)
    return checks


RAY_CHECKS: Mapping[str, Callable[[Cluster, RunConfig], dict[str, Callable[[], Finding]]]] = {
    "rayjob": _rayjob_checks,
}
"""What else has to be there for a way to a Ray cluster, by `ray.cluster.kind`."""


def _kind(cluster: Cluster, path: str, resource: str, fix: str) -> Finding:
    found = cluster.get(path) or {}
    is_there = any(each.get("name") == resource for each in found.get("resources", []))
    return is_there, f"{path.removeprefix('/apis/')} is {'' if is_there else 'not '}served", fix


def _deployments(cluster: Cluster, *names: str) -> Finding:
    """Whether each deployment has a ready pod, in any namespace.

    Raises:
        NotSeen: we may not list deployments in the cluster, and cannot list them, or find none, in our namespace.
    """
    wrong, fixes, absent = list[str](), list[str](), list[str]()
    for name in names:
        by_name = f"deployments?fieldSelector=metadata.name%3D{name}"
        try:
            items = (cluster.get(f"/apis/apps/v1/{by_name}") or {}).get("items", [])
        except NotSeen:
            items = (cluster.get(f"/apis/apps/v1/namespaces/{cluster.namespace}/{by_name}") or {}).get("items", [])
            if not items:
                raise
        if not items:
            absent.append(name)
        elif not any((each.get("status") or {}).get("availableReplicas") for each in items):
            wrong.append(f"{name} has no pod that is ready")
            kubectl = f"kubectl -n {items[0]['metadata']['namespace']}"
            is_off = items[0]["spec"].get("replicas") == 0
            fixes.append(
                f"{kubectl} scale deployment {name} --replicas 1" if is_off else f"{kubectl} describe deployment {name}"
            )
    if absent and not wrong:
        raise NotSeen(f"there is no deployment of the name {', '.join(absent)}")
    return not wrong, "; ".join(wrong) or f"{', '.join(names)} run{'' if names[1:] else 's'}", "; ".join(fixes)


def _nodes(cluster: Cluster) -> Finding:
    """Whether at least one node is ready and accepts pods."""
    found = (cluster.get("/api/v1/nodes") or {}).get("items", [])
    cordoned = [each["metadata"]["name"] for each in found if each["spec"].get("unschedulable")]
    ready = [
        each
        for each in found
        if any(
            c["type"] == "Ready" and c["status"] == "True" for c in (each.get("status") or {}).get("conditions") or []
        )
    ]
    free = [each for each in ready if not each["spec"].get("unschedulable")]
    fix = f"kubectl uncordon {cordoned[0]}" if cordoned else "kubectl describe nodes"
    return bool(free), f"{len(free)} of {len(found)} are ready and take pods", fix


def _dry(cluster: Cluster, path: str, body: Resource) -> Finding:
    try:
        cluster.create(path if path.startswith("/") else cluster.path(path), body)
    except Refused as exc:
        fix = next((fix for words, fix in REFUSALS.items() if words in str(exc)), IN_MESSAGE)
        return False, f"refused: {exc}", fix
    return True, "the API server would take it", ""


def _priority(cluster: Cluster, priority_class: str) -> Finding:
    found = cluster.get(f"{KUEUE}/workloadpriorityclasses/{priority_class}")
    detail = "is there" if found else "the cluster has none of that name"
    return found is not None, detail, "kubectl apply -k infra/kueue"


def _queue(cluster: Cluster, config: RunConfig, queue: str) -> Finding:
    local = cluster.get(f"{KUEUE}/namespaces/{cluster.namespace}/localqueues/{queue}")
    if local is None:
        fix = "kubectl apply -k infra/kueue, or name yours in ray.cluster.queue"
        return False, f"{cluster.namespace} has no LocalQueue {queue}", fix
    name = local["spec"]["clusterQueue"]
    whole = cluster.get(f"{KUEUE}/clusterqueues/{name}")
    if whole is None:
        return False, f"{queue} belongs to ClusterQueue {name}, which is not there", "create it"
    inactive = [
        condition["message"]
        for condition in whole.get("status", {}).get("conditions", [])
        if condition["type"] == "Active" and condition["status"] != "True"
    ]
    if inactive or whole["spec"].get("stopPolicy", "None") != "None":
        return False, f"ClusterQueue {name} admits no job: {'; '.join(inactive) or 'stopped'}", "start it"
    jobs, keys = [config.ray], "ray.num_workers, ray.cluster.worker"
    if config.data.engine == "ray":
        jobs, keys = [*jobs, config.ray.for_data(timeout_s=config.data.timeout_s)], f"{keys}, ray.cluster.data"
    short = list(dict.fromkeys(lack for job in jobs for lack in lacking(demand(job), whole)))
    fix = f"raise the quota of ClusterQueue {name}, or ask for less: {keys}"
    return not short, "; ".join(short) or f"{queue} in {name} has room for this config", fix


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


# Probe pods that try what a run will reach, under the same conditions as its step or its worker in the namespace.

PROBE_S = 180.0
"""Seconds to schedule the pod, pull the image and try the store."""
POLL_S = 2.0
STEP_POD = {"pipelines.kubeflow.org/v2_component": "true"}
RAY_POD = {"ray.io/is-ray-node": "yes"}
"""Labels by which the network policies select the pods of steps, and those of Ray."""
UNPLACED_S = 30.0
"""Seconds that the pod may stay unschedulable before the check fails."""
PROBE_ATTEMPTS = 7
"""Attempts at each request, 45 seconds in all."""
SETTLED_S = 15.0
"""Seconds before the first attempt: network policies apply to a new pod only after it has started, and until then it
may reach what they forbid, or miss what they allow."""
TRY = """
from components.config.schema import RegistryConfig
from components.store import client
from components.store.store import Store
client.ATTEMPTS_WHERE_BUSY = {attempts}
Store.open(RegistryConfig(bucket={bucket!r}, prefix={prefix!r})).check()
print('fineloop: the store is sound')
"""
REACH = """
import os, sys, time
import requests
token, user = os.environ.get('MLFLOW_TRACKING_TOKEN'), os.environ.get('MLFLOW_TRACKING_USERNAME')
headers = {{'Authorization': f'Bearer {{token}}'}} if token else {{}}
auth = (user, os.environ.get('MLFLOW_TRACKING_PASSWORD', '')) if user else None
for attempt in range({attempts}):
    try:
        answer = requests.get({url!r}, timeout=4, headers=headers, auth=auth, allow_redirects=False)
        break
    except requests.RequestException as exc:
        why = exc
        time.sleep(3)
else:
    sys.exit(f'no way to it: {{why}}')
if answer.status_code in {refused!r}:
    sys.exit(f'it wants a token ({{answer.status_code}})')
"""
MLFLOW_PROBE = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=fineloop-doctor"


def probe_questions(config: RunConfig) -> Iterator[Question]:
    """The store from a step, and each MLflow that the config names, from the pods that will send to it.

    A worker finds a tracker's token in the secret of the store. That of announce.mlflow is the promoting step's alone,
    so there 401 and 403 are an answer as well.
    """
    registry = config.registry
    script = TRY.format(attempts=PROBE_ATTEMPTS, bucket=registry.bucket, prefix=registry.prefix)
    yes = f"bucket {registry.bucket} honours conditional writes there"
    yield Question("store, from a pod", script, STEP_POD, yes, IN_MESSAGE)
    for key, url, labels, refused in (
        ("track.mlflow", config.track.mlflow, RAY_POD, (401, 403)),
        ("announce.mlflow", config.announce.mlflow, STEP_POD, ()),
    ):
        if url.startswith("http"):
            script = REACH.format(attempts=PROBE_ATTEMPTS, url=url.rstrip("/") + MLFLOW_PROBE, refused=refused)
            fix = "open the way (infra/network/tracker), and put its token into the secret: infra/README.md, step 6"
            yield Question(f"{key}, from a pod", script, labels, f"{url} answers", fix)


def probe_pod(
    cluster: Cluster,
    account: str,
    image: str,
    script: str,
    name: str = "fineloop-doctor",
    labels: Mapping[str, str] = STEP_POD,
) -> Resource:
    """Return a pod with one container that runs a Python script, with a step's security context and environment."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": {PART_OF: "fineloop", **labels, **NO_MESH},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(PROBE_S),
            **({"serviceAccountName": account} if account else {}),
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "probe",
                    "image": image,
                    "command": ["python", "-c", f"import time; time.sleep({SETTLED_S})\n{script}"],
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "envFrom": [
                        {"configMapRef": {"name": CONFIG_MAP, "optional": True}},
                        {"secretRef": {"name": STORE_SECRET, "optional": True}},
                    ],
                    "resources": {
                        "requests": {"cpu": "500m", "memory": "1Gi"},
                        "limits": {"cpu": "2", "memory": "2Gi"},
                    },
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        },
    }


def run_probe(cluster: Cluster, question: Question, account: str, image: str) -> Finding:
    """Start the probe, wait until it ends, and delete it in any case.

    Raises:
        NotSeen: we may not create pods, or the API server does not answer.
    """
    name = f"fineloop-doctor-{secrets.token_hex(4)}"
    cluster.create(cluster.path("pods"), probe_pod(cluster, account, image, question.script, name, question.labels))
    try:
        return _followed(cluster, name, question, image)
    finally:
        cluster.delete(cluster.path(f"pods/{name}"))


def _followed(cluster: Cluster, name: str, question: Question, image: str) -> Finding:
    began = time.monotonic()
    found: Resource = {}
    while (waited := time.monotonic() - began) < PROBE_S:
        found = cluster.get(cluster.path(f"pods/{name}")) or {}
        phase = found.get("status", {}).get("phase", "Pending")
        if phase == "Succeeded":
            return True, f"{image} runs, and {question.yes}", ""
        if phase == "Failed":
            lines = cluster.log(name).strip().splitlines()
            return False, lines[-1] if lines else _why(found), question.fix
        if stuck := _stuck(found):
            return False, stuck, "give an image that the nodes may pull: --image, imagePullSecrets"
        if waited > UNPLACED_S and (nowhere := _unplaced(found)):
            fix = "kubectl get nodes; where nodes have to be made first, ask again in some minutes"
            return False, f"no node takes the pod: {nowhere}", fix
        time.sleep(POLL_S)
    why = f"the pod did not end within {PROBE_S:.0f} s: {_why(found)}"
    return False, why, f"kubectl -n {cluster.namespace} get events"


def _stuck(found: Resource) -> str:
    """Return why a container cannot start without a change, such as an image that cannot be pulled; else empty."""
    for status in found.get("status", {}).get("containerStatuses") or []:
        waiting = status.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in (
            "ErrImagePull",
            "ImagePullBackOff",
            "InvalidImageName",
            "CreateContainerConfigError",
        ):
            return f"{waiting['reason']}: {waiting.get('message', status.get('image', ''))}"
    return ""


def _unplaced(found: Resource) -> str:
    """Return why the scheduler has no node for the pod; empty if it has one."""
    conditions = found.get("status", {}).get("conditions") or []
    reasons = [each for each in conditions if each["type"] == "PodScheduled" and each.get("reason") == "Unschedulable"]
    return str(reasons[0].get("message") or "Unschedulable") if reasons else ""


def _why(found: Resource) -> str:
    conditions = found.get("status", {}).get("conditions") or []
    messages = [each["message"] for each in conditions if each.get("status") != "True" and each.get("message")]
    return "; ".join(messages) or found.get("status", {}).get("phase", "it was never made")
