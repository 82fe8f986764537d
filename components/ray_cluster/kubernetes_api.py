"""The Kubernetes API for RayJobs: a client, explanations of its refusals, and a watch that resumes when it breaks."""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.ray_cluster.backend import UNREACHABLE_S, repeated
from components.shared.errors import FineloopError, JobError, UserError

logger = logging.getLogger(__name__)

Resource = dict[str, Any]

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
RAYJOBS = (GROUP, VERSION, PLURAL)
WORKFLOWS = ("argoproj.io", "v1alpha1", "workflows")
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
    """RayJobs and pods of one namespace."""

    def __init__(self, namespace: str = "") -> None:
        """Connect: inside a pod by its service account, elsewhere by KUBECONFIG or ~/.kube/config. Without a
        `namespace` it is the pod's own, or the kubeconfig context's. Raises UserError: no API server is configured, or
        no namespace is known."""
        from kubernetes import client

        configured, context_namespace = configuration()
        configured.retries = False  # `call` repeats requests, and for how long
        self.namespace = namespace or own_namespace() or context_namespace
        if not self.namespace:
            raise UserError(
                "ray.cluster.namespace is empty, and neither a pod nor the kubeconfig's context has one: set it"
            )
        api_client = client.ApiClient(configured)
        self._objects, self._core = client.CustomObjectsApi(api_client), client.CoreV1Api(api_client)
        self._where = (GROUP, VERSION, self.namespace, PLURAL)

    def create(self, body: Resource) -> bool:
        """Create a RayJob; returns False if one of that name exists."""

        made = self.call(
            f"create RayJob {body['metadata']['name']}",
            lambda: self._objects.create_namespaced_custom_object(
                *self._where,
                body,
                field_validation="Strict",  # else an older KubeRay silently drops unknown fields
                _request_timeout=CALL_S,
            ),
            UNREACHABLE_S,
            is_answer=lambda exc: exc.status == 409,  # also of a repeated request, when an answer was lost
        )
        return made is not None

    def list(
        self, labels: dict[str, str], *, name: str = "", kind: tuple[str, str, str] = RAYJOBS
    ) -> tuple[list[Resource], str]:
        """List the objects with these labels, or of this name; also returns the resource version of the list."""
        group, version, plural = kind
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        answer = self.call(
            f"list {plural}",
            lambda: self._objects.list_namespaced_custom_object(
                *(group, version, self.namespace, plural),
                label_selector=selector,
                field_selector=_by_name(name),
                _request_timeout=CALL_S,
            ),
            UNREACHABLE_S,
        )
        return answer["items"], answer["metadata"]["resourceVersion"]

    def events(self, name: str, since: str, seconds: int, *, kind: tuple[str, str, str] = RAYJOBS) -> Any:
        """Watch an object from a resource version on, for at most `seconds`; gives raw events, bookmarks among them."""
        from kubernetes.watch import Watch

        group, version, plural = kind
        return Watch().stream(
            self._objects.list_namespaced_custom_object,
            *(group, version, self.namespace, plural),
            field_selector=_by_name(name),
            resource_version=since,
            allow_watch_bookmarks=True,
            timeout_seconds=seconds,
            _request_timeout=(CALL_S, seconds + CALL_S),
        )

    def patch(self, name: str, body: Resource) -> None:
        self.call(
            f"patch RayJob {name}",
            lambda: self._objects.patch_namespaced_custom_object(*self._where, name, body, _request_timeout=CALL_S),
        )

    def delete(self, name: str) -> bool:
        """Delete a RayJob with its cluster and its pods; returns False if there is none of that name."""

        deleted = self.call(
            f"delete RayJob {name}",
            lambda: self._objects.delete_namespaced_custom_object(
                *self._where, name, propagation_policy="Background", _request_timeout=CALL_S
            ),
            is_answer=lambda exc: exc.status == 404,
        )
        return deleted is not None

    def pod_owners(self, name: str) -> Sequence[Resource]:
        pods = self.call(
            f"read pod {name}",
            lambda: self._core.list_namespaced_pod(
                self.namespace, field_selector=_by_name(name), _request_timeout=CALL_S
            ),
            UNREACHABLE_S,
        ).items
        return [owner.to_dict() for pod in pods for owner in pod.metadata.owner_references or []]

    def workloads(self, job_uid: str) -> Sequence[Resource]:
        """The Workloads that Kueue has made for the job with this uid: one, or two for a moment."""
        answer: dict[str, list[Resource]] = self.call(
            "list workloads",
            lambda: self._objects.list_namespaced_custom_object(
                "kueue.x-k8s.io",
                "v1beta2",
                self.namespace,
                "workloads",
                label_selector=f"kueue.x-k8s.io/job-uid={job_uid}",
                _request_timeout=CALL_S,
            ),
        )
        return answer["items"]

    def pod_log(self, labels: dict[str, str]) -> str | None:
        """The whole log of the newest pod with these labels; None when there is none, or it is still being made."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        pods = self.call(
            "list pods",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=CALL_S),
        ).items
        if not pods:
            return None
        name = max(pods, key=lambda pod: str(pod.metadata.creation_timestamp or "")).metadata.name
        response = self.call(
            f"read the log of pod {name}",
            lambda: self._core.read_namespaced_pod_log(
                name, self.namespace, _preload_content=False, _request_timeout=CALL_S
            ),
            is_answer=lambda exc: exc.status == 400 and _STARTING.search(_status_of(exc).get("message", "")),
        )
        return None if response is None else str(response.data.decode("utf-8", errors="replace"))

    def call(
        self,
        what: str,
        call: Callable[[], Any],
        patience_s: float = 0.0,
        *,
        is_answer: Callable[[Any], Any] = lambda _: False,
    ) -> Any:
        """Call the API server; a request that failed for a passing reason is repeated for `patience_s`. A refusal that
        is an answer, too, gives None. Raises JobError: the server did not answer, or refused; the message says what is
        missing."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def may_pass(exc: Exception) -> bool:
            return exc.status in _TRANSIENT if isinstance(exc, ApiException) else isinstance(exc, HTTPError | OSError)

        try:
            return repeated(call, may_pass, for_s=patience_s, every_s=0.5)
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

    def __init__(self, api: KubernetesApi, name: str, kind: tuple[str, str, str] = RAYJOBS) -> None:
        self._api, self._name, self._kind = api, name, kind
        self._version = ""
        self._reached, self._has_warned = time.monotonic(), False
        self.newest: Resource | None = None

    def wait(self, seconds: float) -> Resource | None:
        """Wait for the next change, or for `seconds` (rounded up), and return the state; None when the object is gone.
        Raises JobError: the API server refuses, or has been out of reach for longer than AWAY_S."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if not self._version:
            items, self._version = self._api.list({}, name=self._name, kind=self._kind)
            self._reached, self.newest = time.monotonic(), items[0] if items else None
            return self.newest
        try:
            window_s = max(1, int(seconds + 0.999))
            for event in self._api.events(self._name, self._version, window_s, kind=self._kind):
                resource: Resource = event["raw_object"]
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
            raise self._api.refusal(f"watch {self._kind[2]}", error) from error
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


def _by_name(name: str) -> str:
    return f"metadata.name={name}" if name else ""


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
        owners = [owner for owner in KubernetesApi(own_namespace()).pod_owners(pod) if owner["kind"] == KIND]
    except FineloopError as exc:
        logger.warning("which run this pod belongs to is not known: %s", exc)
        return None
    return Workflow(owners[0]["name"], owners[0]["uid"]) if owners else None
