"""A live Kubernetes as kubectl shows it, and Ray jobs that the product runs there, without Kubeflow."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from infra.checks.manifests import KUBECTL

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 600.0  # how long one thing may take on a busy node whose images are there
STOP_S = 60.0  # by when nothing of a stopped run may hold a processor
LEFT = "pods,jobs,services,configmaps,secrets,pvc,pv,rayclusters,rayjobs,workloads.kueue.x-k8s.io"
STEP = {"pipelines.kubeflow.org/v2_component": "true"}  # by which the network policies know a step
T = TypeVar("T")
STEPS = re.compile(r"step (\d+)/\d+ ")


class Followed:
    """A process that waits for a job, as a step does, and what it has said so far."""

    def __init__(self, run_id: str, log: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.run_id, self._log = run_id, log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def says(self, words: str, timeout_s: float = SOON_S) -> None:
        def said() -> bool:
            assert words in self.text or self.process.poll() is None, f"ended without {words!r}:\n{self.text}"
            return words in self.text

        until(said, f"{self.run_id} says {words!r}", timeout_s)

    def has_trained(self, step: int, timeout_s: float = 2 * SOON_S) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, f"ended before step {step}:\n{self.text}"
            return any(int(number) >= step for number in STEPS.findall(self.text))

        until(is_there, f"{self.run_id} is at step {step}", timeout_s)

    def end(self, timeout_s: float = 2 * SOON_S) -> int:
        return self.process.wait(timeout_s)


@dataclass
class Kube:
    """`settings` fit the example's config to the cluster; `name` belongs to one test."""

    namespace: str
    settings: Sequence[str]
    name: str
    scratch: Path
    followed: list[Followed] = field(default_factory=list)
    has_trained: bool = False

    @property
    def prefix(self) -> str:
        return f"acceptance/{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def kubectl(self, *arguments: str, body: Mapping[str, Any] | None = None, namespace: str = "") -> str:
        """Run it in the namespace of the runs, or another one."""
        done = subprocess.run(
            [KUBECTL, "-n", namespace or self.namespace, *arguments],
            input=json.dumps(body) if body else None,
            capture_output=True,
            text=True,
            timeout=SOON_S,
            check=False,
        )
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def get(self, *what: str, namespace: str = "") -> dict[str, Any]:
        """An object, or a list of them; {} where there is none."""
        found = self.kubectl("get", *what, "-o", "json", "--ignore-not-found", namespace=namespace)
        return dict(json.loads(found)) if found else {}

    def start(
        self, *command: str, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Followed:
        run_id = f"{self.name}-{len(self.followed)}"
        return self._start(
            run_id, ["-m", "tests.cluster.follow", run_id, *self.settings, *settings, "--", *command], environment
        )

    def train(self, *settings: str) -> Followed:
        """Start `fineloop run`: its steps here, its training as a job there."""
        keys = (f"adapter.name={self.name}", f"registry.prefix={self.prefix}", *self.settings, *settings)
        options = [word for key in keys for word in ("--set", key)]
        run_id = f"{self.name}-{len(self.followed)}"
        self.has_trained = True
        here = ["--run-id", run_id, "--home", str(self.scratch / "home")]
        return self._start(run_id, ["-m", "pipelines.cli", "run", *here, *options], None)

    def _start(self, run_id: str, command: Sequence[str], environment: Mapping[str, str] | None) -> Followed:
        log, whole = self.scratch / f"{run_id}.log", {**self.environment, **(environment or {})}
        started = Followed(run_id, log, [sys.executable, *command], whole)
        self.followed.append(started)
        return started

    def rayjob(self, run_id: str) -> dict[str, Any]:
        selector = f"fineloop.dev/run-id={run_id}"
        found = self.get("rayjobs", "-l", selector).get("items")
        return dict(found[-1]) if found else {}

    def pods(self, *labels: str) -> list[str]:
        found = self.get("pods", "-l", ",".join(labels)).get("items", [])
        return [pod["metadata"]["name"] for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def pods_of(self, run_id: str, component: str = "") -> list[str]:
        """Names of the pods of the run's job: all, or those of `head`, `worker` or `submitter`."""
        kind = [f"app.kubernetes.io/component=ray-{component}"] if component else []
        return self.pods(f"fineloop.dev/run-id={run_id}", *kind)

    def evict(self, pod_name: str) -> None:
        """By the API, as `kubectl drain` does."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod_name}}
        where = f"/api/v1/namespaces/{self.namespace}/pods/{pod_name}/eviction"
        self.kubectl("create", "--raw", where, "-f", "-", body=body)

    def everything(self) -> set[str]:
        """Kind and name of all that a run may leave in the namespace, and volumes; not what the reaper leaves."""
        found = self.kubectl("get", LEFT, "-o", "name").split()
        return {name for name in found if "/fineloop-reap-" not in name}

    def nothing_is_left(self, run_id: str, timeout_s: float = SOON_S) -> float:
        """Wait until the run has no pod of Ray; how long that took."""
        began = time.monotonic()
        until(lambda: not self._ray_pods(run_id), f"no pod of {run_id}", timeout_s)
        return time.monotonic() - began

    def _ray_pods(self, run_id: str) -> list[dict[str, Any]]:
        """Also those on their way out, for they hold their GPUs."""
        selector = f"fineloop.dev/run-id={run_id},app.kubernetes.io/component in (ray-head,ray-worker)"
        return list(self.get("pods", "-l", selector).get("items", []))

    def clean_up(self) -> None:
        for each in self.followed:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
            self.kubectl("delete", "rayjobs", "-l", f"fineloop.dev/run-id={each.run_id}", "--wait=false")

    @contextlib.contextmanager
    def scaled_to_none(self, deployment: str, namespace: str = "") -> Iterator[None]:
        """A deployment without a pod, for a while."""
        self._scale(deployment, 0, namespace)
        try:
            yield
        finally:
            self._scale(deployment, 1, namespace)
            self.kubectl("rollout", "status", "deployment", deployment, "--timeout", "300s", namespace=namespace)

    def _scale(self, deployment: str, replicas: int, namespace: str) -> None:
        self.kubectl("scale", "deployment", deployment, "--replicas", str(replicas), namespace=namespace)

        def as_wanted() -> bool:
            status = self.get("deployment", deployment, namespace=namespace).get("status", {})
            return bool(status.get("availableReplicas", 0) == replicas and status.get("replicas", 0) == replicas)

        until(as_wanted, f"{deployment} has {replicas} pods")

    @contextlib.contextmanager
    def cordoned(self) -> Iterator[None]:
        """Every node takes no pod, for a while."""
        nodes = [node["metadata"]["name"] for node in self.get("nodes")["items"]]
        self.kubectl("cordon", *nodes)
        try:
            yield
        finally:
            self.kubectl("uncordon", *nodes)

    @contextlib.contextmanager
    def without(self, kind: str, name: str, namespace: str = "") -> Iterator[None]:
        """An object deleted, and created again."""
        found = self.get(kind, name, namespace=namespace)
        found["metadata"] = {
            key: found["metadata"].get(key, {}) for key in ("name", "namespace", "labels", "annotations")
        }
        found.pop("status", None)
        self.kubectl("delete", kind, name, namespace=namespace)
        try:
            yield
        finally:
            self.kubectl("create", "-f", "-", body=found, namespace=namespace)

    @contextlib.contextmanager
    def changed(self, kind: str, name: str, patch: Mapping[str, Any], back: Mapping[str, Any]) -> Iterator[None]:
        """An object merged with a patch, and with another that takes it back."""
        self.kubectl("patch", kind, name, "--type", "merge", "-p", json.dumps(patch))
        try:
            yield
        finally:
            self.kubectl("patch", kind, name, "--type", "merge", "-p", json.dumps(back))


def until(look: Callable[[], T | None], what: str, timeout_s: float = SOON_S) -> T:
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s not: {what}"
        time.sleep(1)
    return seen


def pod(name: str, labels: dict[str, str], image: str, *command: str) -> dict[str, Any]:
    """A pod of the smallest size, which a restricted namespace admits."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    size = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}}
    container = {"name": "try", "image": image, "command": command, "securityContext": security, "resources": size}
    user = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False, "securityContext": user}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {**spec, "containers": [container]},
    }
