"""A run's step in a pod as Kubeflow gives it, which a workflow owns, and what Argo makes of that pod's end.

Where Argo is not installed its kind is made, and no controller acts on it: the test starts a step's next attempt.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster.kube import STEP, Kube, pod, until
from tests.infra.retries import Ended

ARGO = "argoproj.io"
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
KIND = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"workflows.{ARGO}"},
    "spec": {
        "group": ARGO,
        "scope": "Namespaced",
        "names": {"kind": "Workflow", "plural": "workflows"},
        "versions": [{"name": "v1alpha1", "served": True, "storage": True, "schema": {"openAPIV3Schema": ANYTHING}}],
    },
}
FOLLOWS = Path(__file__).with_name("follow.py").read_text(encoding="utf-8")
FILL = "/var/scratch"
LAUNCHER = 'trap "exit 143" TERM; "$@" & wait $!; code=$?; [ $code -lt 126 ] || code=1; exit $code'
"""Kubeflow's ends at once on SIGTERM, the container with it, and with 1 where the step was killed."""
GREEDY = """
import pathlib, threading, time
def take() -> None:
    while not pathlib.Path("/tmp/take").exists():
        time.sleep(0.1)
    b"x" * (2 << 30)
threading.Thread(target=take, daemon=True).start()
"""
"""Takes more memory than a step has, once it is asked to."""


@contextlib.contextmanager
def kind_of_runs(kube: Kube) -> Iterator[None]:
    """Argo's, made where it is missing."""
    is_missing = not kube.get("crd", f"workflows.{ARGO}")
    if is_missing:
        kube.kubectl("create", "-f", "-", body=KIND)
        kube.kubectl("wait", f"crd/workflows.{ARGO}", "--for", "condition=established", "--timeout", "60s")
    try:
        yield
    finally:
        if is_missing:
            kube.kubectl("delete", "crd", f"workflows.{ARGO}")


class Step:
    """A workflow, and one step of it that waits for a job which runs a command."""

    def __init__(self, kube: Kube, image: str, *command: str) -> None:
        self._kube, self._image, self._command = kube, image, command
        self.run_id, self.attempts = f"{kube.name}-step", 0
        workflow = {"apiVersion": f"{ARGO}/v1alpha1", "kind": "Workflow", "metadata": {"name": kube.name}, "spec": {}}
        kube.kubectl("create", "-f", "-", body=workflow)
        self._uid = kube.get("workflow", kube.name)["metadata"]["uid"]
        self.attempt()

    @property
    def pod(self) -> str:
        return f"{self.run_id}-{self.attempts}"

    def attempt(self) -> None:
        """Start a pod, as Argo does for each attempt."""
        self.attempts += 1
        follow = ("python", "-c", GREEDY + FOLLOWS, self.run_id, *self._kube.settings, "--", *self._command)
        body = pod(self.pod, STEP, self._image, "sh", "-c", LAUNCHER, "launcher", *follow)
        body["metadata"]["ownerReferences"] = [
            {"apiVersion": f"{ARGO}/v1alpha1", "kind": "Workflow", "name": self._kube.name, "uid": self._uid}
        ]
        body["spec"] |= {"serviceAccountName": "fineloop-pipeline", "automountServiceAccountToken": True}
        body["spec"]["volumes"] = [{"name": "scratch", "emptyDir": {"sizeLimit": "10Mi"}}]
        (container,) = body["spec"]["containers"]
        container["name"] = "main"
        token = {"secretKeyRef": {"name": "fineloop-ray", "key": "auth_token"}}
        container["env"] = [
            {"name": "KFP_POD_NAME", "value": self.pod},
            {"name": "HOME", "value": "/tmp"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
        ]
        container["envFrom"] = [{"configMapRef": {"name": "fineloop-env"}}]
        container["resources"]["limits"]["memory"] = "1Gi"
        container["volumeMounts"] = [{"name": "scratch", "mountPath": FILL}]
        self._kube.kubectl("create", "-f", "-", body=body)
        self._kube.kubectl("wait", "pod", self.pod, "--for", "condition=Ready", "--timeout", "300s")

    @property
    def text(self) -> str:
        return self._kube.kubectl("logs", self.pod)

    def says(self, words: str) -> None:
        until(lambda: words in self.text, f"{self.pod} says {words!r}")

    def ended(self) -> Ended:
        """How Argo sees the newest attempt's end, once it has come."""
        return until(lambda: _as_argo_sees(self._kube.get("pod", self.pod)), f"{self.pod} is over")

    def stop_in_the_workflow(self) -> None:
        """As Kubeflow does."""
        patch = json.dumps({"spec": {"activeDeadlineSeconds": 0}})
        self._kube.kubectl("patch", "workflow", self._kube.name, "--type", "merge", "-p", patch)

    def lose(self) -> None:
        self._kube.kubectl("delete", "pod", self.pod, "--grace-period", "0", "--force", "--ignore-not-found")

    def evict(self) -> None:
        """By the API, as `kubectl drain` does."""
        self._kube.evict(self.pod)

    def fill_its_disk(self) -> None:
        """Past its limit, for which the kubelet evicts."""
        self._kube.kubectl("exec", self.pod, "--", "dd", "if=/dev/zero", f"of={FILL}/full", "bs=1M", "count=30")

    def take_its_memory(self) -> None:
        self._kube.kubectl("exec", self.pod, "--", "touch", "/tmp/take")

    def clean_up(self) -> None:
        self._kube.kubectl("delete", "workflow", self._kube.name, "--ignore-not-found")


def _as_argo_sees(found: dict[str, Any]) -> Ended | None:
    """As Argo 4.0 does (workflow/controller/operator.go, inferFailedReason, podReconciliation); None before the end."""
    if not found:
        return Ended("Error", "-1", "pod deleted")
    status = found["status"]
    over = [each["state"].get("terminated") for each in status.get("containerStatuses", [])]
    exit_code = str(over[0]["exitCode"]) if over and over[0] else "-1"
    if status["phase"] == "Succeeded":
        return Ended("Succeeded", exit_code, "")
    if status["phase"] != "Failed":
        return None
    if status.get("message"):
        return Ended("Failed", exit_code, status["message"])
    reason = f"main: {over[0]['reason']} (exit code {exit_code})" if over and over[0] else "pod failed"
    return Ended("Failed", exit_code, reason)
