"""The Argo workflow of the Kubeflow run that this step belongs to. It owns what the step starts.

The step's pod does not own it: draining a node removes the pod while the run goes on, and Argo runs the step again in
another pod. So a stop must be distinguished from a drain, and a signal does not say which it is. After SIGTERM a step's
Python lives for 0.2 to 1.0 s without a stdout (measured on Kubeflow 2.17 with Argo 4.0), too short to ask the API on a
busy node, so that nothing relies on that second. A stop is written into the workflow before any pod receives a signal,
and three things react to it:

- the step watches its workflow, and stops its job when that is being stopped;
- `fineloop runs stop` stops the run's jobs itself, where it may;
- `fineloop reap`, every minute, stops the jobs of a run that a person has stopped, at once.

The job has no lease: a lease that ends the job within a minute of its step's silence would end every training whose
step waits for another node.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from components.ray_cluster.kubernetes_api import WORKFLOWS, KubernetesApi, Resource, Watched, own_namespace
from components.shared.errors import FineloopError, JobError

logger = logging.getLogger(__name__)

API_VERSION, KIND = "argoproj.io/v1alpha1", "Workflow"
OVER = ("Succeeded", "Failed", "Error")
SHUT_DOWN = ("Stop", "Terminate")
WINDOW_S = 60.0
"""How long one watch lasts, in seconds."""
AGAIN_S = 15.0
"""Seconds to wait after the API server was away, or refused."""


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
    """Whether the workflow is over, gone, being deleted or being stopped.

    Kubeflow stops a run by setting its deadline to 0 (2.17, apiserver/resource/resource_manager.go, TerminateWorkflow);
    `argo stop` and `argo terminate` set spec.shutdown.
    """
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
