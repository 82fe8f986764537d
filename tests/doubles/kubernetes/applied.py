"""A double of the Kubernetes API server that holds what an overlay of infra/ applies, for those who only look.

It answers for objects by path, for kinds, for access reviews (by the overlay's own Roles and bindings) and judges dry
runs by the RayJob's schema and the namespace's pod security, worded as the API server words them. A pod that is made
ends as `pod_status` says; its log is `pod_log`.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.checks import schemas
from infra.checks.manifests import Manifest, render
from infra.checks.policies import access
from tests.doubles.http_server import Answer, serving
from tests.doubles.kubernetes import kubeconfig
from tests.doubles.kubernetes.api import NAMESPACE, TOKEN, Refusal

DEPLOYMENTS = (
    ("ray-system", "kuberay-operator"),
    ("kueue-system", "kueue-controller-manager"),
    (NAMESPACE, "workflow-controller"),
    (NAMESPACE, "ml-pipeline-persistenceagent"),
    (NAMESPACE, "ml-pipeline-scheduledworkflow"),
)
"""What helm and Kubeflow's manifests make."""


class AppliedCluster:
    """Listens on loopback while `applied` lasts."""

    def __init__(self, overlay: str) -> None:
        self.objects = {_path(manifest): manifest for manifest in render(f"infra/overlays/{overlay}")}
        self.kinds = {"/apis/ray.io/v1": ["rayjobs"], "/apis/kueue.x-k8s.io/v1beta2": ["localqueues", "clusterqueues"]}
        self.denied: set[str] = set()
        """Paths, or beginnings of them, that our credentials may not touch."""
        self.pod_status: dict[str, Any] = {"phase": "Succeeded"}
        self.pod_log = "fineloop: the store is sound\n"
        self.made: list[str] = []
        """Paths of what was created for good."""
        self.pods: list[Any] = []
        """Each pod that was made, as it was asked for."""
        for name, data in (("fineloop-ray", {"auth_token": "eA=="}), ("fineloop-s3", {"AWS_ACCESS_KEY_ID": "eA=="})):
            self.put(f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}", {"data": data})
        for where, name in DEPLOYMENTS:
            self.deploy(where, name)
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        self.put("/api/v1/nodes/node", {"spec": {}, "status": ready})
        self.put(f"/api/v1/namespaces/{NAMESPACE}/configmaps/kfp-launcher", {"data": {"providers": "minio: {}"}})

    def put(self, path: str, found: dict[str, Any]) -> None:
        """Have an object at a path."""
        self.objects[path] = {"metadata": {"name": path.rpartition("/")[2]}, **found}

    def deploy(self, namespace: str, name: str, replicas: int = 1) -> None:
        """Have a deployment with so many pods."""
        found = {"spec": {"replicas": replicas}, "status": {"availableReplicas": replicas} if replicas else {}}
        found["metadata"] = {"name": name, "namespace": namespace}
        self.put(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}", found)

    def drop(self, kind: str, name: str = "") -> None:
        """Forget the objects of a kind."""
        self.objects = {
            path: found
            for path, found in self.objects.items()
            if not path.endswith(f"/{kind}/{name}" if name else "") or (not name and f"/{kind}/" not in path)
        }

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Any:
        """What the API server would say; raises Refusal."""
        if any(path.startswith(denied) for denied in self.denied):
            kind = path.rpartition("/")[2]
            verb = {"GET": "get", "POST": "create", "DELETE": "delete"}[method]
            message = f'{kind} is forbidden: User "somebody" cannot {verb} resource "{kind}" in API group ""'
            raise Refusal(403, "Forbidden", message)
        if path == "/version":
            return {"gitVersion": "v1.34.4"}
        if path in self.kinds:
            return {"kind": "APIResourceList", "resources": [{"name": name} for name in self.kinds[path]]}
        if path.endswith("/localsubjectaccessreviews"):
            return {**body, "status": {"allowed": self._allows(body["spec"])}}
        if method == "POST":
            return self._create(path, query, body)
        if path.endswith("/log"):
            return self.pod_log
        if path == "/api/v1/nodes" or path.endswith("/deployments"):
            return {"items": self._listed(path, query)}
        if path not in self.objects:
            raise Refusal(404, "NotFound", f"{path.rpartition('/')[2]} not found", name=path.rpartition("/")[2])
        if method == "DELETE":
            del self.objects[path]
            return {"kind": "Status", "status": "Success"}
        return copy.deepcopy(self.objects[path])

    def _listed(self, path: str, query: Mapping[str, str]) -> list[Any]:
        """The objects of one namespace, or of all if the path names none."""
        begin, _, kind = path.rpartition("/")
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        return [
            copy.deepcopy(found)
            for at, found in self.objects.items()
            if at.startswith(begin) and at.endswith(f"/{kind}/{found['metadata']['name']}")
            if name in ("", found["metadata"]["name"])
        ]

    def _create(self, path: str, query: Mapping[str, str], body: Any) -> Any:
        if path.endswith("/rayjobs") and (wrong := schemas.errors(body, schemas.crds_folder())):
            raise Refusal(422, "Invalid", f"RayJob.ray.io is invalid: {wrong}")
        if path.endswith("/pods"):
            self._admit(body)
        if query.get("dryRun") != "All":
            name = f"{path}/{body['metadata']['name']}"
            self.made.append(name)
            self.pods.append(body)
            self.objects[name] = {**body, "status": self.pod_status}
        return body

    def _admit(self, pod: Any) -> None:
        """The two of restricted's rules that a forgotten security context breaks first."""
        namespace = self.objects[f"/api/v1/namespaces/{NAMESPACE}"]
        if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            return
        wrong = [] if pod["spec"].get("securityContext", {}).get("runAsNonRoot") else ["runAsNonRoot != true"]
        for container in pod["spec"]["containers"]:
            if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
                wrong.append("allowPrivilegeEscalation != false")
        if wrong:
            message = f'pods "{pod["metadata"]["name"]}" is forbidden: violates PodSecurity "restricted:v1.34": '
            raise Refusal(403, "Forbidden", message + ", ".join(wrong))

    def _allows(self, spec: Any) -> bool:
        wanted = spec["resourceAttributes"]
        applied = [found for found in self.objects.values() if "kind" in found]
        parts = (wanted["group"], wanted["resource"], wanted["subresource"])
        account = spec["user"].rpartition(":")[2]
        return (wanted["verb"], "/".join(filter(None, parts))) in access.rights(applied, account)


@contextmanager
def applied(overlay: str, path: Path) -> Iterator[AppliedCluster]:
    """A cluster to which an overlay was applied; a kubeconfig that leads there is written to `path`."""
    cluster = AppliedCluster(overlay)

    def handle(verb: str, at: str, query: Mapping[str, str], body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            if headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            return 200, cluster.answer(verb, at, query, json.loads(body or b"null"))
        except Refusal as refusal:
            return refusal.code, refusal.body

    with serving(handle) as url:
        kubeconfig.write(path, {"server": url}, namespace=NAMESPACE, token=TOKEN)
        yield cluster


def _path(manifest: Manifest) -> str:
    group, _, version = manifest["apiVersion"].rpartition("/")
    kind, meta = manifest["kind"], manifest["metadata"]
    plural = kind.lower() + ("es" if kind.endswith(("s", "x")) else "s")
    where = f"namespaces/{meta['namespace']}/" if "namespace" in meta else ""
    return f"/{f'apis/{group}' if group else 'api'}/{version}/{where}{plural}/{meta['name']}"
