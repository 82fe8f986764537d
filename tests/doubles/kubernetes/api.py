"""A double of the Kubernetes API server for RayJobs and pods, over HTTP on loopback: what our client may meet.

Resource versions, watches with bookmarks and 410 Gone, finalizers, the status subresource, label and field selectors,
401, 403 by RBAC, 404, 409, and 422 or 400 by the schema. It has no other resources, and collects no garbage.
"""

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.checks import schemas
from tests.doubles.http_server import Answer, serving
from tests.doubles.kubernetes import kubeconfig

Resource = dict[str, Any]
TOKEN = "a-service-account-token"
USER = "system:serviceaccount:fineloop:fineloop-pipeline"
NAMESPACE = "fineloop"
UNKNOWN = "Additional properties are not allowed"
_PATHS = {
    resource: re.compile(rf"/{group}/namespaces/{NAMESPACE}/{resource}(?:/([^/]+))?(/status|/log)?")
    for resource, group in {
        "rayjobs": "apis/ray.io/v1",
        "pods": "api/v1",
        "workloads": "apis/kueue.x-k8s.io/v1beta2",
        "workflows": "apis/argoproj.io/v1alpha1",
    }.items()
}


class Refusal(Exception):
    """An answer other than success, as the API server words it."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self.body |= {"reason": reason, "message": message, "details": details}


class KubernetesDouble:
    """Listens on loopback from construction to `close`."""

    def __init__(self, *, validate: bool = True) -> None:
        self.rayjobs: dict[str, Resource] = {}
        self.pods: dict[str, Resource] = {}
        self.workloads: dict[str, Resource] = {}
        """Kueue's, to be listed."""
        self.workflows: dict[str, Resource] = {}
        """Argo's, to be listed and watched by name."""
        self.pod_logs: dict[str, Callable[[], str]] = {}
        self.requests: list[tuple[str, str, str]] = []
        """Verb, resource and name of each, in order."""
        self.denied: set[tuple[str, str]] = set()
        """(verb, resource) that RBAC does not allow."""
        self.is_installed = True
        self.admit: Callable[[Resource], None] = lambda body: None
        """A mutating webhook, such as Kueue's; may raise Refusal."""
        self.outages = 0
        """How many of the next requests get no answer but 503."""
        self.before_answer: Callable[[str, str], None] = lambda verb, resource: None
        self.changed = threading.Condition()
        self._validate = validate
        self._version, self._oldest = 100, 0
        self._events: list[tuple[int, str, Resource]] = []
        self._watch_era = 0
        self.is_closed = False
        self._ends = ExitStack()
        self.address = self._ends.enter_context(serving(self._serve, protocol="HTTP/1.1"))

    def close(self) -> None:
        self.is_closed = True
        self.drop_watches()
        self._ends.close()

    def kubeconfig(self, path: Path, *, token: str = TOKEN) -> Path:
        """Write one that leads here."""
        return kubeconfig.write(path, {"server": self.address}, namespace=NAMESPACE, token=token)

    # What a test does to it.

    def drop_watches(self) -> None:
        """Cut every open watch in the middle of a line."""
        with self.changed:
            self._watch_era += 1
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget the history, as etcd does after five minutes: a watch from an earlier version gets 410 Gone."""
        with self.changed:
            self._version += 1
            self._oldest = self._version
            self._events.clear()
            self._watch_era += 1
            self.changed.notify_all()

    def add(self, body: Resource) -> None:
        """Create a RayJob as somebody else would."""
        with self.changed:
            self._create(body, strict=False)

    def write(self, name: str, change: Callable[[Resource], None]) -> None:
        """Change a RayJob as somebody else would."""
        with self.changed:
            found = copy.deepcopy(self.rayjobs[name])
            change(found)
            self._store("MODIFIED", found)

    def end_workflow(self, name: str, change: Resource | None) -> None:
        """Merge a change into a workflow, as Kubeflow or Argo does; None deletes it."""
        with self.changed:
            found = merged(self.workflows[name], change or {})
            self._record("MODIFIED" if change else "DELETED", found)
            if change:
                self.workflows[name] = found
            else:
                del self.workflows[name]

    def patch_status(self, name: str, status: Resource) -> None:
        """As an operator does."""
        with self.changed:
            if name in self.rayjobs:
                self._merge(self.rayjobs[name], {"status": status}, status=True)

    def remove_finalizers(self, name: str) -> None:
        with self.changed:
            if name in self.rayjobs:
                self._merge(self.rayjobs[name], {"metadata": {"finalizers": None}}, status=False)

    # What the API server does.

    def _serve(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        is_one = re.search(r"/(rayjobs|pods|workflows)/", path)
        verbs = {"GET": "get" if is_one else "list", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
        try:
            given, authorization = json.loads(body or b"null"), headers.get("Authorization", "")
            found = self.answer(verbs[method], path, query, given, authorization)
            if query.get("watch", "").lower() == "true":
                self._authorize("watch", "workflows" if "/workflows" in path else "rayjobs")
                return 200, self._watch(query)
            kind = "text/plain" if isinstance(found, str) else "application/json"
            return 201 if method == "POST" else 200, found, {"Content-Type": kind}
        except Refusal as refusal:
            return refusal.code, refusal.body

    def answer(self, verb: str, path: str, query: Mapping[str, str], body: Any, authorization: str) -> Resource | str:
        if authorization != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized", "Unauthorized")
        resource, match = next(
            ((kind, match) for kind, pattern in _PATHS.items() if (match := pattern.fullmatch(path))), ("", None)
        )
        if match is None or (resource == "rayjobs" and not self.is_installed):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        name, sub = match[1] or "", match[2] or ""
        self.requests.append((verb, resource + sub, name))
        self.before_answer(verb, resource)
        self._authorize(verb, resource + sub)
        if self.outages > 0:
            self.outages -= 1
            raise Refusal(503, "ServiceUnavailable", "etcdserver: leader changed")
        if sub == "/log":
            if name not in self.pods:
                raise Refusal(404, "NotFound", f'pods "{name}" not found', name=name, kind="pods")
            return self.pod_logs[name]()
        objects: dict[str, Resource] = getattr(self, resource)
        with self.changed:
            if verb == "list":
                items = [copy.deepcopy(found) for found in objects.values() if selected(found, query)]
                return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}
            if verb == "create":
                return self._create(body, strict=query.get("fieldValidation") == "Strict")
            if name not in objects:
                raise Refusal(404, "NotFound", f'{resource}.ray.io "{name}" not found', name=name, kind=resource)
            if verb == "patch":
                return self._merge(objects[name], body, status=bool(sub))
            if verb == "delete":
                return self._delete(name)
            return copy.deepcopy(objects[name])

    def _watch(self, query: Mapping[str, str]) -> Iterator[bytes]:
        """Events as lines until the time is over; or the beginning of one, where the connection is to be cut."""
        seen, end = int(query.get("resourceVersion", 0)), time.monotonic() + float(query.get("timeoutSeconds", 1800))
        with self.changed:
            era = self._watch_era
        while True:
            with self.changed:
                if self._watch_era != era:
                    yield b'{"type": "MODIF'
                    raise ConnectionAbortedError
                if seen < self._oldest:
                    gone = Refusal(410, "Expired", f"too old resource version: {seen} ({self._oldest})").body
                    yield _line("ERROR", gone)
                    return
                new = [event for event in self._events if event[0] > seen]
                if not new:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    self.changed.wait(left)
                    continue
            for version, kind, found in new:
                seen = version
                if selected(found, query):
                    yield _line(kind, found)
        if query.get("allowWatchBookmarks", "").lower() == "true":
            meta = {"resourceVersion": str(self._version)}
            yield _line("BOOKMARK", {"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": meta})

    def _authorize(self, verb: str, resource: str) -> None:
        if (verb, resource) in self.denied:
            group = "ray.io" if resource.startswith("rayjobs") else ""
            full = resource.replace("rayjobs", "rayjobs.ray.io")
            message = f'{full} is forbidden: User "{USER}" cannot {verb} resource "{resource}" in API group "{group}"'
            raise Refusal(403, "Forbidden", f'{message} in the namespace "{NAMESPACE}"', kind=resource)

    def _create(self, body: Resource, *, strict: bool) -> Resource:
        body = copy.deepcopy(body)
        name = body["metadata"]["name"]
        self.admit(body)
        if self._validate:
            self._check(body, strict=strict)
        if name in self.rayjobs:
            raise Refusal(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists', name=name, kind="rayjobs")
        body.pop("status", None)
        body["metadata"] |= {"uid": f"uid-{self._version}", "generation": 1, "creationTimestamp": now()}
        return copy.deepcopy(self._store("ADDED", body))

    def _check(self, body: Resource, *, strict: bool) -> None:
        """By KubeRay's own definition, where FINELOOP_CRDS names a folder with it."""
        faults = schemas.errors(body, schemas.crds_folder())
        wrong = [fault.partition(": ") for fault in faults if UNKNOWN not in fault]
        unknown = [fault for fault in faults if UNKNOWN in fault]
        if unknown and strict:
            message = f'RayJob in version "v1" cannot be handled: strict decoding error: {"; ".join(unknown)}'
            raise Refusal(400, "BadRequest", message)
        if wrong:
            name = body["metadata"]["name"]
            causes = [{"reason": "FieldValueInvalid", "field": field, "message": why} for field, _, why in wrong]
            raise Refusal(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {faults}', name=name, causes=causes)

    def _merge(self, found: Resource, patch: Resource, *, status: bool) -> Resource:
        """A merge patch; the status is changed through its own path alone, and nothing else is there."""
        allowed = {key: value for key, value in patch.items() if (key == "status") == status}
        changed = merged(found, allowed)
        if changed["metadata"].get("deletionTimestamp") and not changed["metadata"].get("finalizers"):
            self._remove(changed["metadata"]["name"])
            return changed
        return copy.deepcopy(self._store("MODIFIED", changed))

    def _delete(self, name: str) -> Resource:
        found = copy.deepcopy(self.rayjobs[name])
        if found["metadata"].get("finalizers"):
            found["metadata"].setdefault("deletionTimestamp", now())
            return copy.deepcopy(self._store("MODIFIED", found))
        self._remove(name)
        return {"kind": "Status", "status": "Success"}

    def _remove(self, name: str) -> None:
        found = copy.deepcopy(self.rayjobs.pop(name))
        self._record("DELETED", found)

    def _store(self, kind: str, found: Resource) -> Resource:
        self._record(kind, found)
        self.rayjobs[found["metadata"]["name"]] = found
        return found

    def _record(self, kind: str, found: Resource) -> None:
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, kind, copy.deepcopy(found)))
        self.changed.notify_all()


def selected(found: Resource, query: Mapping[str, str]) -> bool:
    """Whether an object matches a request's selectors: equality alone, which is what we use."""
    meta = found["metadata"]
    labels = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
    fields = dict(pair.split("=", 1) for pair in query.get("fieldSelector", "").split(",") if pair)
    assert fields.keys() <= {"metadata.name"}, fields
    is_named = fields.get("metadata.name", meta["name"]) == meta["name"]
    return is_named and labels.items() <= meta.get("labels", {}).items()


def merged(found: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(found) if isinstance(found, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(kind: str, found: Resource) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"
