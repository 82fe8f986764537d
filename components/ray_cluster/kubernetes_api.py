"""The Kubernetes API for RayJobs: a client, explanations of its refusals, and a watch that resumes when it breaks."""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.ray_cluster.backend import UNREACHABLE_S, repeated
from components.shared.errors import FineloopError, JobError, UserError

logger = logging.getLogger(__name__)

Resource = dict[str, Any]

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
RAYJOBS = f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/{PLURAL}"
WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/{}/workflows"
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/{}/workloads"
PODS = "/api/v1/namespaces/{}/pods"
"""Paths of the API; {} is a namespace."""
SERVICE_ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The folder that Kubernetes mounts into every pod that may talk to its API."""
CALL_S = 10.0
AWAY_S = 600.0
"""How long the API server may be away while a job is followed, which goes on without it: during an upgrade, a server
that is alone in its control plane is away for minutes."""
_TRANSIENT = (0, 429, 500, 502, 503, 504)
_STARTING = re.compile("is waiting to start: (ContainerCreating|PodInitializing)$")
"""The kubelet's words for a container that is being started; those for an image that cannot be pulled differ."""
_DENIED = re.compile(r'User "([^"]+)" cannot (\w+) resource "([^"]+)"')


class KubernetesApi:
    """The API server, and a namespace of it."""

    def __init__(self, namespace: str = "") -> None:
        """Connect; without a `namespace` to the pod's own, or the kubeconfig context's. Raises UserError: no API server
        is configured, or no namespace is known."""
        from kubernetes import client

        configured, context_namespace = configuration()
        configured.retries = False  # `call` repeats requests, and for how long
        self.address = configured.host
        self.namespace = namespace or own_namespace() or context_namespace
        if not self.namespace:
            raise UserError(
                "no namespace is named, and neither a pod nor the kubeconfig's context has one: set "
                "ray.cluster.namespace, or give --namespace"
            )
        self._client = client.ApiClient(configured)

    def send(
        self,
        method: str,
        path: str,
        body: Resource | None = None,
        *,
        query: Mapping[str, str] | None = None,
        timeouts_s: float | tuple[float, float] = CALL_S,
    ) -> Any:
        """Send one request; returns the response, whose body is still to be read. Raises ApiException: the server
        refuses; HTTPError, OSError: it does not answer."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return self._client.call_api(
            path.format(self.namespace),
            method,
            query_params=[*(query or {}).items()],
            header_params={"Accept": "application/json, */*", "Content-Type": kind},
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=timeouts_s,
        )

    def create(self, body: Resource) -> bool:
        """Create a RayJob; returns False if one of that name exists."""
        strict = {"fieldValidation": "Strict"}  # else an older KubeRay silently drops unknown fields
        made = self.call(
            f"create RayJob {body['metadata']['name']}",
            lambda: self.send("POST", RAYJOBS, body, query=strict),
            UNREACHABLE_S,
            is_answer=lambda exc: exc.status == 409,  # also of a repeated request, when an answer was lost
        )
        return made is not None

    def list(
        self, labels: Mapping[str, str], *, name: str = "", path: str = RAYJOBS, patience_s: float = UNREACHABLE_S
    ) -> tuple[list[Resource], str]:
        """List the objects with these labels, or of this name; also returns the resource version of the list."""
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items()), **_by_name(name)}
        send = partial(self.send, "GET", path, query=query)
        answer = json.loads(self.call(f"list {path.rpartition('/')[2]}", send, patience_s))
        return answer["items"], answer["metadata"]["resourceVersion"]

    def events(self, name: str, since: str, seconds: int, *, path: str = RAYJOBS) -> Iterator[Resource]:
        """Watch an object from a resource version on, for at most `seconds`; gives raw events, bookmarks among them."""
        from kubernetes.client import ApiException
        from kubernetes.watch.watch import iter_resp_lines

        query = {"watch": "true", "resourceVersion": since, "timeoutSeconds": str(seconds), **_by_name(name)}
        query["allowWatchBookmarks"] = "true"
        with contextlib.closing(self.send("GET", path, query=query, timeouts_s=(CALL_S, seconds + CALL_S))) as response:
            for line in iter_resp_lines(response):
                event: Resource = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiException(status=event["object"].get("code"), reason=event["object"].get("message"))
                yield event

    def patch(self, name: str, body: Resource) -> None:
        self.call(f"patch RayJob {name}", lambda: self.send("PATCH", f"{RAYJOBS}/{name}", body))

    def delete(self, name: str) -> bool:
        """Delete a RayJob with its cluster and its pods; returns False if there is none of that name."""
        send = partial(self.send, "DELETE", f"{RAYJOBS}/{name}", query={"propagationPolicy": "Background"})
        return self.call(f"delete RayJob {name}", send, is_answer=lambda exc: exc.status == 404) is not None

    def pod_log(self, labels: Mapping[str, str]) -> str | None:
        """The whole log of the newest pod with these labels; None when there is none, or it is still being made."""
        pods, _ = self.list(labels, path=PODS, patience_s=0)
        if not pods:
            return None
        name = max((pod["metadata"] for pod in pods), key=lambda meta: meta.get("creationTimestamp") or "")["name"]
        return self.call(
            f"read the log of pod {name}",
            lambda: self.send("GET", f"{PODS}/{name}/log"),
            is_answer=lambda exc: exc.status == 400 and _STARTING.search(_status_of(exc).get("message", "")),
        )

    def call(
        self,
        what: str,
        send: Callable[[], Any],
        patience_s: float = 0.0,
        *,
        is_answer: Callable[[Any], Any] = lambda _: False,
    ) -> Any:
        """Call `send`, and return the text that it answers; a request that failed for a passing reason is repeated for
        `patience_s`. A refusal that is an answer, too, gives None. Raises JobError: the server did not answer, or
        refused; the message says what is missing."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def may_pass(exc: Exception) -> bool:
            return exc.status in _TRANSIENT if isinstance(exc, ApiException) else isinstance(exc, HTTPError | OSError)

        try:
            return repeated(lambda: read(send()), may_pass, for_s=patience_s, every_s=0.5)
        except (ApiException, HTTPError, OSError) as exc:
            if isinstance(exc, ApiException) and is_answer(exc):
                return None
            raise self.refusal(what, exc) from exc

    def refusal(self, what: str, error: Exception) -> JobError:
        code, answer = getattr(error, "status", None), _status_of(error)
        denied = _DENIED.search(answer.get("message", ""))
        if denied:
            user, verb, resource = denied.groups()
            return JobError(
                f"could not {what}: {user} may not {verb} {resource} in namespace {self.namespace}: "
                "apply the Role in infra/rbac (kubectl apply -k infra/rbac)"
            )
        if code == 401:
            return JobError(f"could not {what}: the Kubernetes API does not accept our credentials (401 Unauthorized)")
        if code == 404 and not answer.get("details", {}).get("name"):  # with a name, the object itself is missing
            return JobError(f"could not {what}: KubeRay is not installed: the cluster knows no {PLURAL}.{GROUP}")
        causes = answer.get("details", {}).get("causes") or []
        fields = "; ".join(f"{cause.get('field')}: {cause.get('message')}" for cause in causes)
        reason = fields or answer.get("message") or str(error).strip()
        return JobError(f"could not {what}: {f'refused with {code}: ' if code else ''}{reason}")


class Watched:
    """The newest state of one object, a RayJob for example, however often the watch on it breaks."""

    def __init__(self, api: KubernetesApi, name: str, path: str = RAYJOBS) -> None:
        self._api, self._name, self._path = api, name, path
        self._version = ""
        self._reached, self._has_warned = time.monotonic(), False
        self.newest: Resource | None = None

    def wait(self, seconds: float) -> Resource | None:
        """Wait for the next change, or for `seconds` (rounded up), and return the state; None when the object is gone.
        Raises JobError: the API server refuses, or has been out of reach for longer than AWAY_S."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if not self._version:
            items, self._version = self._api.list({}, name=self._name, path=self._path)
            self._reached, self.newest = time.monotonic(), items[0] if items else None
            return self.newest
        try:
            window_s = max(1, int(seconds + 0.999))
            for event in self._api.events(self._name, self._version, window_s, path=self._path):
                resource: Resource = event["object"]
                self._version = resource["metadata"]["resourceVersion"]
                self._reached = time.monotonic()
                if event["type"] == "BOOKMARK":
                    continue
                self.newest = None if event["type"] == "DELETED" else resource
                break
            self._reached = time.monotonic()
        except (ApiException, HTTPError, OSError, ValueError) as exc:  # ValueError: a line that was cut off
            self._broken(exc)
        return self.newest

    def _broken(self, error: Exception) -> None:
        status = getattr(error, "status", None)
        if status == 410:  # our version is older than what the server remembers
            self._version = ""
            return
        away_s = time.monotonic() - self._reached
        if status in (401, 403, 404) or away_s > AWAY_S:
            raise self._api.refusal(f"watch {self._path.rpartition('/')[2]}", error) from error
        if away_s > UNREACHABLE_S and not self._has_warned:
            logger.warning("the Kubernetes API is away: %s goes on, and is followed again when it answers", self._name)
            self._has_warned = True
        time.sleep(0.5)


def own_namespace() -> str:
    """The namespace of the pod that this process runs in; empty elsewhere."""
    try:
        return (SERVICE_ACCOUNT_DIR / "namespace").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def configuration() -> tuple[Any, str]:
    """How to reach the API server, and the namespace of the kubeconfig's context. Raises UserError: no API server is
    configured, or this pod may not talk to it."""
    from kubernetes import client, config

    settings = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException as exc:
            raise UserError(f"this pod may not talk to the Kubernetes API ({exc}): give it a service account") from exc
        return settings, ""
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"  # the client reads the variable only at import
    try:
        config.load_kube_config(config_file=path, client_configuration=settings)
        _, context = config.list_kube_config_contexts(config_file=path)
    except (config.ConfigException, OSError) as exc:
        raise UserError(
            f"no Kubernetes API is named by {path} ({exc}): run inside the cluster, or set KUBECONFIG to one that you "
            "may read"
        ) from exc
    return settings, str((context or {}).get("context", {}).get("namespace") or "")


def conditions(resource: Resource, *statuses: str) -> dict[str, Resource]:
    """The conditions of an object by type; with `statuses`, those that have one of them."""
    stated = (resource.get("status") or {}).get("conditions") or []
    return {condition["type"]: condition for condition in stated if not statuses or condition["status"] in statuses}


def read(response: Any) -> str:
    """The text of a response's body."""
    return str(response.data.decode("utf-8", errors="replace"))


def _by_name(name: str) -> dict[str, str]:
    return {"fieldSelector": f"metadata.name={name}"} if name else {}


def _status_of(error: Exception) -> dict[str, Any]:
    """The Status object that the API server answered with; empty if the answer was none."""
    try:
        status = json.loads(getattr(error, "body", None) or "{}")
    except (TypeError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


# The Argo workflow of the Kubeflow run that this step belongs to owns what the step starts. Its pod does not:
# draining a node removes the pod while the run goes on, and Argo runs the step again in another pod. So a stop must
# be told from a drain, which a signal does not: after SIGTERM a step's Python lives for 0.2 to 1.0 s without a stdout
# (measured on Kubeflow 2.17 with Argo 4.0), too short to ask the API. A stop is written into the workflow before any
# pod receives a signal: the step watches it, `fineloop runs stop` stops the run's jobs itself, and `fineloop reap`
# does so every minute. The job has no lease, which would end every training whose step waits for another node.

API_VERSION, KIND = "argoproj.io/v1alpha1", "Workflow"
OVER = ("Succeeded", "Failed", "Error")
SHUT_DOWN = ("Stop", "Terminate")
WINDOW_S = 60.0  # how long one watch lasts, in seconds
AGAIN_S = 15.0  # seconds to wait after the API server was away, or refused


@dataclass(frozen=True)
class Workflow:
    """A workflow in this pod's namespace."""

    name: str
    uid: str

    def reference(self) -> dict[str, Any]:
        """The owner reference, not as the controller: Kubernetes accepts only one controller."""
        return {"apiVersion": API_VERSION, "kind": KIND, "name": self.name, "uid": self.uid, "controller": False}

    @contextlib.contextmanager
    def watched(self, at_its_end: Callable[[], None]) -> Iterator[None]:
        """Call `at_its_end` once, from its own thread, when the workflow ends or is being stopped during this block."""
        left = threading.Event()
        threading.Thread(target=self._watch, args=(at_its_end, left), daemon=True, name="workflow").start()
        try:
            yield
        finally:
            left.set()

    def _watch(self, at_its_end: Callable[[], None], left: threading.Event) -> None:
        warned = False
        while not left.is_set():
            try:
                watched = Watched(KubernetesApi(own_namespace()), self.name, WORKFLOWS)
                while not is_ending(watched.wait(WINDOW_S)):
                    if left.is_set():
                        return
                if not left.is_set():
                    at_its_end()
                return
            except JobError as exc:
                if not warned:
                    logger.warning("whether the run goes on is not known: %s", exc)
                warned = True
                left.wait(AGAIN_S)


def is_ending(workflow: Resource | None) -> bool:
    """Whether the workflow is over, gone, being deleted or being stopped. Kubeflow stops a run by setting its deadline
    to 0 (2.17, apiserver/resource/resource_manager.go, TerminateWorkflow); `argo stop` and `argo terminate` set
    spec.shutdown."""
    if workflow is None or workflow["metadata"].get("deletionTimestamp"):
        return True
    spec, status = workflow.get("spec") or {}, workflow.get("status") or {}
    return spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown") in SHUT_DOWN or status.get("phase") in OVER


def own_workflow() -> Workflow | None:
    """The workflow of the pod that this process runs in; None outside Kubeflow, or if Kubernetes does not tell it."""
    pod = os.environ.get("KFP_POD_NAME", "")
    if not pod or not own_namespace():
        return None
    try:
        pods, _ = KubernetesApi(own_namespace()).list({}, name=pod, path=PODS)
        owners = [owner for resource in pods for owner in resource["metadata"].get("ownerReferences", [])]
    except FineloopError as exc:
        logger.warning("which run this pod belongs to is not known: %s", exc)
        return None
    return next((Workflow(owner["name"], owner["uid"]) for owner in owners if owner["kind"] == KIND), None)
