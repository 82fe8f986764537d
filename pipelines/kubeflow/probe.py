"""A pod in the place of a pipeline's step that tries the store, as the namespace would have a step run."""

import secrets
import time

from components.config.schema import RegistryConfig
from components.ray_cluster.rayjob_manifest import CONFIG_MAP, NO_MESH, PART_OF, STORE_SECRET
from pipelines.check import Check
from pipelines.kubeflow.cluster import Cluster, Resource

PATIENCE_S = 180.0
"""To schedule the pod, pull the image and ask the store."""
POLL_S = 2.0
STEP_LABEL = "pipelines.kubeflow.org/v2_component"
"""By which the network policies know a step."""
UNPLACED_S = 30.0
"""How long no node may take the pod until that is the finding."""
ATTEMPTS = 7
"""At each request, three quarters of a minute: the policies of a new pod open its way only after it has started."""
TRY = """
from components.config.schema import RegistryConfig
from components.store import client
from components.store.store import Store
client.ATTEMPTS_WHERE_BUSY = {attempts}
Store.open(RegistryConfig(bucket={bucket!r}, prefix={prefix!r})).check()
print('fineloop: the store is sound')
"""


def pod(namespace: str, account: str, image: str, script: str, name: str = "fineloop-doctor") -> Resource:
    """One container that runs a Python script, under the security context and with the environment of a step."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {PART_OF: "fineloop", STEP_LABEL: "true", **NO_MESH},
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


def run(cluster: Cluster, registry: RegistryConfig, account: str, image: str) -> Check:
    """Start the probe, wait for its end, and delete it whatever comes.

    Raises:
        NotSeen: we may not make pods, or the API server is away.
    """
    name = f"fineloop-doctor-{secrets.token_hex(4)}"
    pods = f"/api/v1/namespaces/{cluster.namespace}/pods"
    script = TRY.format(attempts=ATTEMPTS, bucket=registry.bucket, prefix=registry.prefix)
    cluster.create(pods, pod(cluster.namespace, account, image, script, name))
    try:
        return _followed(cluster, f"{pods}/{name}", name, registry, image)
    finally:
        cluster.delete(f"{pods}/{name}")


def _followed(cluster: Cluster, path: str, name: str, registry: RegistryConfig, image: str) -> Check:
    title, began = "store, from a pod", time.monotonic()
    found: Resource = {}
    while (waited := time.monotonic() - began) < PATIENCE_S:
        found = cluster.get(path) or {}
        phase = found.get("status", {}).get("phase", "Pending")
        if phase == "Succeeded":
            detail = f"{image} runs, and bucket {registry.bucket} honours conditional writes there"
            return Check(title, True, detail, "")
        if phase == "Failed":
            said = cluster.log(name).strip().splitlines()
            return Check(title, False, said[-1] if said else _why(found), "see the message")
        if stuck := _stuck(found):
            return Check(title, False, stuck, "give an image that the nodes may pull: --image, imagePullSecrets")
        if waited > UNPLACED_S and (nowhere := _unplaced(found)):
            fix = "kubectl get nodes; where nodes have to be made first, ask again in some minutes"
            return Check(title, False, f"no node takes the pod: {nowhere}", fix)
        time.sleep(POLL_S)
    why = f"the pod did not end within {PATIENCE_S:.0f} s: {_why(found)}"
    return Check(title, False, why, f"kubectl -n {cluster.namespace} get events")


def _stuck(found: Resource) -> str:
    """What a container waits for that will not come by itself."""
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
    """Why the scheduler has no node for it."""
    conditions = found.get("status", {}).get("conditions") or []
    reasons = [each for each in conditions if each["type"] == "PodScheduled" and each.get("reason") == "Unschedulable"]
    return str(reasons[0].get("message") or "Unschedulable") if reasons else ""


def _why(found: Resource) -> str:
    conditions = found.get("status", {}).get("conditions") or []
    messages = [each["message"] for each in conditions if each.get("status") != "True" and each.get("message")]
    return "; ".join(messages) or found.get("status", {}).get("phase", "it was never made")
