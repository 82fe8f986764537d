"""Probe pods that try what a run will reach, under the same conditions as its step or its worker in the namespace."""

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from components.config.schema import RunConfig
from components.ray_cluster.rayjob_manifest import CONFIG_MAP, NO_MESH, PART_OF, STORE_SECRET
from pipelines.check import IN_MESSAGE, Check
from pipelines.kubeflow.cluster import Cluster, Resource

PATIENCE_S = 180.0
"""Seconds to schedule the pod, pull the image and try the store."""
POLL_S = 2.0
STEP = {"pipelines.kubeflow.org/v2_component": "true"}
RAY_POD = {"ray.io/is-ray-node": "yes"}
"""Labels by which the network policies select the pods of steps, and those of Ray."""
UNPLACED_S = 30.0
"""Seconds that the pod may stay unschedulable before the check fails."""
ATTEMPTS = 7
"""Attempts at each request, 45 seconds in all: network policies take effect for a new pod only after it has started."""
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
EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=fineloop-doctor"


@dataclass(frozen=True)
class Question:
    """What one pod tries, and how the answer is told."""

    title: str
    script: str
    labels: Mapping[str, str]
    """Labels of the pods that it stands for."""
    yes: str
    fix: str


def questions(config: RunConfig) -> Iterator[Question]:
    """The store from a step, and each MLflow that the config names, from the pods that will send to it.

    A worker finds a tracker's token in the secret of the store. That of announce.mlflow is the promoting step's alone,
    so there 401 and 403 are an answer as well.
    """
    registry = config.registry
    script = TRY.format(attempts=ATTEMPTS, bucket=registry.bucket, prefix=registry.prefix)
    yes = f"bucket {registry.bucket} honours conditional writes there"
    yield Question("store, from a pod", script, STEP, yes, IN_MESSAGE)
    for key, url, labels, refused in (
        ("track.mlflow", config.track.mlflow, RAY_POD, (401, 403)),
        ("announce.mlflow", config.announce.mlflow, STEP, ()),
    ):
        if url.startswith("http"):
            script = REACH.format(attempts=ATTEMPTS, url=url.rstrip("/") + EXPERIMENT, refused=refused)
            fix = "open the way (infra/network/tracker), and put its token into the secret: infra/README.md, step 6"
            yield Question(f"{key}, from a pod", script, labels, f"{url} answers", fix)


def pod(
    namespace: str,
    account: str,
    image: str,
    script: str,
    name: str = "fineloop-doctor",
    labels: Mapping[str, str] = STEP,
) -> Resource:
    """Return a pod with one container that runs a Python script, with a step's security context and environment."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {PART_OF: "fineloop", **labels, **NO_MESH},
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(PATIENCE_S),
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
                    "command": ["python", "-c", script],
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


def run(cluster: Cluster, question: Question, account: str, image: str) -> Check:
    """Start the probe, wait until it ends, and delete it in any case.

    Raises:
        NotSeen: we may not create pods, or the API server does not answer.
    """
    name = f"fineloop-doctor-{secrets.token_hex(4)}"
    pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
    cluster.create(pods, pod(cluster.namespace, account, image, question.script, name, question.labels))
    try:
        return _followed(cluster, f"{pods}/{name}", name, question, image)
    finally:
        cluster.delete(f"{pods}/{name}")


def _followed(cluster: Cluster, path: str, name: str, question: Question, image: str) -> Check:
    title, began = question.title, time.monotonic()
    found: Resource = {}
    while (waited := time.monotonic() - began) < PATIENCE_S:
        found = cluster.get(path) or {}
        phase = found.get("status", {}).get("phase", "Pending")
        if phase == "Succeeded":
            return Check(title, True, f"{image} runs, and {question.yes}", "")
        if phase == "Failed":
            said = cluster.log(name).strip().splitlines()
            return Check(title, False, said[-1] if said else _why(found), question.fix)
        if stuck := _stuck(found):
            return Check(title, False, stuck, "give an image that the nodes may pull: --image, imagePullSecrets")
        if waited > UNPLACED_S and (nowhere := _unplaced(found)):
            fix = "kubectl get nodes; where nodes have to be made first, ask again in some minutes"
            return Check(title, False, f"no node takes the pod: {nowhere}", fix)
        time.sleep(POLL_S)
    why = f"the pod did not end within {PATIENCE_S:.0f} s: {_why(found)}"
    return Check(title, False, why, f"kubectl -n {cluster.namespace} get events")


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
