"""Whether a cluster can run a config: `fineloop doctor --host URL`. It answers what a run would only find out late.

It reads, and has the API server judge a RayJob and a step's pod without making them (dryRun). With an image it also
starts pods in the place of a step or a worker, one after the other, which try the store and each MLflow that the config
names, and deletes them again.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RunConfig
from components.handover.announce import reached
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import KubernetesApi, Resource, conditions, read
from components.ray_cluster.rayjob_manifest import CONFIG_MAP, NO_MESH, PART_OF, RAY_SECRET, STORE_SECRET, rayjob
from components.shared.errors import FineloopError
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
"""Kubeflow's deployments that start steps, report that runs have ended, and start the runs of schedules."""

Finding = tuple[bool, str, str]
"""Whether it is right, what was seen, and what mends it."""
Ask = Callable[[], Finding]


class NotSeen(Exception):
    """The API server does not permit the request, or cannot be reached; the text says which."""


class Refused(NotSeen):
    """The API server, or an admission webhook, rejected the object that it was asked to create."""


@dataclass(frozen=True)
class Cluster:
    """What doctor reads of an API server."""

    api: KubernetesApi

    @property
    def namespace(self) -> str:
        return self.api.namespace

    def get(self, path: str) -> Resource:
        """Return the object at a path of the API; empty if there is none."""
        return dict(json.loads(self.ask("GET", path) or "{}"))

    def ask(self, method: str, path: str, body: Resource | None = None) -> str:
        """Return the text that a path of the API, or such as pods/NAME of the namespace, answers; empty for a 404.
        Raises Refused: what was to be created is rejected; NotSeen: we may not do that, or the server does not
        answer."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            whole = path if path.startswith("/") else f"/api/v1/namespaces/{{}}/{path}".rstrip("/")
            return read(self.api.send(method, whole, body))
        except ApiException as exc:
            if exc.status == 404:
                return ""
            try:
                reason = str(json.loads(exc.body)["message"])
            except (TypeError, ValueError, KeyError):
                reason = f"refused with {exc.status}"
            # Refusals of RBAC, and not of pod security or a quota, which are 403 too.
            is_ours = exc.status == 401 or (exc.status == 403 and " cannot " in reason and " resource " in reason)
            raise (Refused if method == "POST" and not is_ours else NotSeen)(reason) from exc
        except (HTTPError, OSError) as exc:
            raise NotSeen(f"{self.api.address} does not answer: {exc}") from exc


class Question(NamedTuple):
    """What one pod tries, and how the answer is told."""

    title: str
    script: str
    labels: Mapping[str, str]
    """Labels of the pods that it stands for."""
    yes: str
    fix: str


def cluster_checks(
    config: RunConfig, environment: Mapping[str, str], *, host: str, namespace: str, service_account: str, image: str
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
        cluster = Cluster(KubernetesApi(namespace or environment.get("KFP_NAMESPACE", "")))
        version = cluster.get("/version") or {}
    except (FineloopError, NotSeen) as exc:
        yield Check("kubernetes", False, str(exc), IN_MESSAGE)
        return
    yield Check("kubernetes", True, f"{version.get('gitVersion', 'unknown version')} at {cluster.api.address}", "")
    try:
        namespaced = cluster.get("")
        if not namespaced:
            yield Check("namespace", False, f"there is no {cluster.namespace}", "kubectl apply -k infra/namespace")
            return
        level = (namespaced["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    except NotSeen:  # a person of one namespace may not read the namespace itself
        level = None
    yield Check("namespace", True, f"{cluster.namespace}{f', which admits {level} pods' if level else ''}", "")
    accounts = [service_account, *config.ray.cluster.accounts[: 2 if config.registry.trusted_keys else 1]]
    # In a namespace of a user the profile controller makes the launcher's config, which needs no providers there.
    environments = {name: key for name, key in ENVIRONMENTS.items() if not (has_many_users and name == LAUNCHER)}
    address = (f"configmaps/{CONFIG_MAP}", "RAY_ADDRESS")
    checks: dict[str, Ask] = {
        "kubeflow's controllers": partial(_deployments, cluster, *KUBEFLOW_CONTROLLERS),
        "nodes": partial(_nodes, cluster),
        **{
            f"account {name}": partial(_there, cluster, f"serviceaccounts/{name}", "kubectl apply -k infra/rbac")
            for name in accounts
            if name
        },
        "rights of the steps": partial(_rights, cluster, service_account),
        **{name: partial(_environment, cluster, name, key) for name, key in environments.items()},
        "openlineage": partial(_open_lineage, cluster),
        "notified": partial(_notified, cluster, config),
        **({"ray address": partial(_environment, cluster, *address)} if config.ray.cluster.has_address else {}),
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


def _there(cluster: Cluster, path: str, fix: str) -> Finding:
    is_there = bool(cluster.get(path))
    kind, name = path.split("/")[-2:]
    return is_there, "is there" if is_there else f"{cluster.namespace} has no such {kind.rstrip('s')} {name}", fix


def _rights(cluster: Cluster, account: str) -> Finding:
    """Asked for the account, not for us: a LocalSubjectAccessReview, which takes rights of its own."""
    user = f"system:serviceaccount:{cluster.namespace}:{account or 'default'}"
    path = f"/apis/authorization.k8s.io/v1/namespaces/{cluster.namespace}/localsubjectaccessreviews"
    missing = []
    for (group, resource), verbs in RIGHTS.items():
        kind, _, part = resource.partition("/")
        for verb in verbs:
            about = {"namespace": cluster.namespace, "group": group, "resource": kind, "subresource": part}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "LocalSubjectAccessReview",
                "metadata": {"namespace": cluster.namespace},
                "spec": {"user": user, "resourceAttributes": {**about, "verb": verb}},
            }
            if not json.loads(cluster.ask("POST", path, review) or "{}").get("status", {}).get("allowed"):
                missing.append(f"{verb} {resource}")
    detail = f"{user} may not {', '.join(missing)}" if missing else "all that a run asks for"
    return not missing, detail, "kubectl apply -k infra/rbac"


def _environment(cluster: Cluster, name: str, key: str) -> Finding:
    kind, _, object_name = name.partition("/")
    resource = cluster.get(name)
    if not resource and object_name == STORE_SECRET:
        return True, "absent: right where the service account's role gives access to the store", ""
    has_key = bool((resource.get("data") or {}).get(key))
    detail = f"{'has' if has_key else 'has no'} key {key}" if resource else f"{cluster.namespace} has none"
    return has_key, detail, f"make the {kind[:-1]} {object_name} as infra/README.md says"


def _open_lineage(cluster: Cluster) -> Finding:
    """Whether a server gets events of runs, and with which key; without TLS anyone could read the key."""
    url = (cluster.get(f"configmaps/{CONFIG_MAP}").get("data") or {}).get("OPENLINEAGE_URL", "")
    name = next(iter(of_its_own()["report"].kubernetes))
    has_key = bool(url) and "OPENLINEAGE_API_KEY" in (cluster.get(f"secrets/{name}").get("data") or {})
    detail = f"{url}, {'with' if has_key else 'without'} the key of secret {name}" if url else "not configured"
    fix = f"set an https:// address as OPENLINEAGE_URL in the config map {CONFIG_MAP}, or delete the secret's key"
    return not (has_key and url.startswith("http://")), detail, fix


def _notified(cluster: Cluster, config: RunConfig) -> Finding:
    name = next(iter(of_its_own()["promote"].kubernetes))
    secret = cluster.get(f"secrets/{name}").get("data") or {} if config.announce.servers else {}
    return *reached(config.announce, secret), f"make them keys of the secret {name}, as infra/README.md says"


def _rayjob_checks(cluster: Cluster, config: RunConfig) -> dict[str, Ask]:
    ray = config.ray.cluster
    assert isinstance(ray, RayJobCluster)
    job = rayjob(config.ray, Job("doctor", "finetune", ("true",), 60.0), 1, namespace=cluster.namespace)
    path = f"{KUBERAY}/namespaces/{cluster.namespace}/rayjobs?dryRun=All&fieldValidation=Strict"
    checks: dict[str, Ask] = {
        "kuberay": partial(_served, cluster, KUBERAY, "rayjobs", "install KubeRay: infra/README.md"),
        "kuberay's operator": partial(_deployments, cluster, "kuberay-operator"),
        "a RayJob of this config": partial(_dry, cluster, path, job),
    }
    if ray.queue:
        fix = "install Kueue, or leave ray.cluster.queue empty"
        checks["kueue"] = partial(_served, cluster, KUEUE, "localqueues", fix)
        checks["kueue's manager"] = partial(_deployments, cluster, "kueue-controller-manager")
        checks["queue"] = partial(_queue, cluster, config, ray.queue)
        if ray.priority_class:
            path = f"{KUEUE}/workloadpriorityclasses/{ray.priority_class}"
            checks[f"priority {ray.priority_class}"] = partial(_there, cluster, path, "kubectl apply -k infra/kueue")
    return checks


RAY_CHECKS: Mapping[str, Callable[[Cluster, RunConfig], dict[str, Ask]]] = {"rayjob": _rayjob_checks}
"""What else has to be there for a way to a Ray cluster, by `ray.cluster.kind`."""


def _served(cluster: Cluster, path: str, resource: str, fix: str) -> Finding:
    is_served = any(kind["name"] == resource for kind in cluster.get(path).get("resources", []))
    return is_served, f"{path.removeprefix('/apis/')} is {'' if is_served else 'not '}served", fix


def _deployments(cluster: Cluster, *names: str) -> Finding:
    """Whether each deployment has a ready pod, in any namespace. Raises NotSeen: we may not list deployments in the
    cluster, and find none in our namespace."""
    absent = []
    for name in names:
        by_name = f"deployments?fieldSelector=metadata.name%3D{name}"
        try:
            deployments = cluster.get(f"/apis/apps/v1/{by_name}").get("items")
        except NotSeen:
            deployments = cluster.get(f"/apis/apps/v1/namespaces/{cluster.namespace}/{by_name}").get("items")
            if not deployments:
                raise
        if not deployments:
            absent.append(name)
        elif not any((deployment.get("status") or {}).get("availableReplicas") for deployment in deployments):
            namespace = deployments[0]["metadata"]["namespace"]
            fix = f"kubectl -n {namespace} scale deployment {name} --replicas 1, or describe it"
            return False, f"{name} has no pod that is ready", fix
    if absent:
        raise NotSeen(f"there is no deployment of the name {', '.join(absent)}")
    return True, f"{', '.join(names)} run{'' if names[1:] else 's'}", ""


def _nodes(cluster: Cluster) -> Finding:
    """Whether at least one node is ready and accepts pods."""
    nodes = cluster.get("/api/v1/nodes").get("items") or []
    cordoned = [node["metadata"]["name"] for node in nodes if node["spec"].get("unschedulable")]
    free = [node for node in nodes if not node["spec"].get("unschedulable") and "Ready" in conditions(node, "True")]
    fix = f"kubectl uncordon {cordoned[0]}" if cordoned else "kubectl describe nodes"
    return bool(free), f"{len(free)} of {len(nodes)} are ready and take pods", fix


def _dry(cluster: Cluster, path: str, body: Resource) -> Finding:
    try:
        cluster.ask("POST", path, body)
    except Refused as exc:
        fix = next((fix for words, fix in REFUSALS.items() if words in str(exc)), IN_MESSAGE)
        return False, f"refused: {exc}", fix
    return True, "the API server would take it", ""


def _queue(cluster: Cluster, config: RunConfig, queue: str) -> Finding:
    local = cluster.get(f"{KUEUE}/namespaces/{cluster.namespace}/localqueues/{queue}")
    if not local:
        fix = "kubectl apply -k infra/kueue, or name yours in ray.cluster.queue"
        return False, f"{cluster.namespace} has no LocalQueue {queue}", fix
    name = local["spec"]["clusterQueue"]
    whole = cluster.get(f"{KUEUE}/clusterqueues/{name}")
    if not whole:
        return False, f"{queue} belongs to ClusterQueue {name}, which is not there", "create it"
    inactive = conditions(whole, "False", "Unknown").get("Active")
    if inactive or whole["spec"].get("stopPolicy", "None") != "None":
        return False, f"ClusterQueue {name} admits no job: {inactive['message'] if inactive else 'stopped'}", "start it"
    jobs = [config.ray, *([config.ray.for_data()] if config.data.engine == "ray" else [])]
    short = list(dict.fromkeys(lack for job in jobs for lack in lacking(job, whole)))
    fix = f"raise the quota of ClusterQueue {name}, or ask for less: ray.num_workers, ray.cluster.worker"
    return not short, "; ".join(short) or f"{queue} in {name} has room for this config", fix


def lacking(ray: RayConfig, cluster_queue: Mapping[str, Any]) -> Iterator[str]:
    """Why the queue can never grant what head, workers and submitter request, which Kueue admits together."""
    from kubernetes.utils.quantity import parse_quantity

    spec = rayjob(ray, Job("quota", "finetune", ("true",), 60.0), 1, namespace="any")["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [(1, cluster["headGroupSpec"]["template"]), (1, spec["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in cluster["workerGroupSpecs"]]
    needs: dict[str, Decimal] = {}
    for count, template in pods:
        for container in template["spec"]["containers"]:
            for name, quantity in container["resources"]["requests"].items():
                needs[name] = needs.get(name, Decimal(0)) + count * parse_quantity(quantity)
    # Without a limit it may borrow all that its cohort has.
    borrowed = "1Ei" if cluster_queue["spec"].get("cohortName") else "0"
    room: dict[str, Decimal] = {}
    for group in cluster_queue["spec"].get("resourceGroups", []):
        for quota in (resource for flavor in group["flavors"] for resource in flavor["resources"]):
            most = parse_quantity(quota["nominalQuota"]) + parse_quantity(quota.get("borrowingLimit", borrowed))
            room[quota["name"]] = max(room.get(quota["name"], Decimal(0)), most)
    for name, need in needs.items():
        if name not in room:
            yield f"{name}: not covered by the queue"
        elif need > room[name]:
            yield f"{name}: {_formatted(need)} asked for, at most {_formatted(room[name])} given"


def _formatted(quantity: Decimal) -> str:
    gib = quantity / 2**30
    return f"{gib:.0f} GiB" if gib >= 1 else f"{quantity.normalize():f}"


# Probe pods that try what a run will reach, under the same conditions as its step or its worker in the namespace.

PROBE_S = 180.0
"""Seconds to schedule the pod, pull the image and try the store."""
POLL_S = 2.0
STUCK = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError")
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
    """Start the probe, wait until it ends, and delete it in any case. Raises NotSeen: we may not create pods."""
    name = f"fineloop-doctor-{secrets.token_hex(4)}"
    pod = probe_pod(cluster, account, image, question.script, name, question.labels)
    cluster.ask("POST", "pods", pod)
    began = time.monotonic()
    try:
        while (waited := time.monotonic() - began) < PROBE_S:
            pod = cluster.get(f"pods/{name}")
            status = pod.get("status", {})
            why = "; ".join(c["message"] for c in conditions(pod, "False", "Unknown").values() if c.get("message"))
            if status.get("phase") == "Succeeded":
                return True, f"{image} runs, and {question.yes}", ""
            if status.get("phase") == "Failed":
                lines = cluster.ask("GET", f"pods/{name}/log").strip().splitlines()
                return False, lines[-1] if lines else why, question.fix
            for container in status.get("containerStatuses") or []:
                waiting = container.get("state", {}).get("waiting") or {}
                if waiting.get("reason") in STUCK:
                    fix = "give an image that the nodes may pull: --image, imagePullSecrets"
                    return False, f"{waiting['reason']}: {waiting.get('message', '')}", fix
            if waited > UNPLACED_S and conditions(pod, "False").get("PodScheduled", {}).get("reason"):
                fix = "kubectl get nodes; where nodes have to be made first, ask again in some minutes"
                return False, f"no node takes the pod: {why}", fix
            time.sleep(POLL_S)
        fix = f"kubectl -n {cluster.namespace} get events"
        return False, f"the pod did not end within {PROBE_S:.0f} s: {why or status.get('phase', '')}", fix
    finally:
        cluster.ask("DELETE", f"pods/{name}")
