"""The Argo workflow of the Kubeflow run that this step belongs to. It owns what the step starts.

The step's pod does not: a drained node takes it away while the run goes on, and Argo runs the step again in another.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

from components.ray_cluster.kubernetes_api import QUICK_S, KubernetesApi, own_namespace
from components.shared.errors import FineloopError

logger = logging.getLogger(__name__)

API_VERSION, KIND = "argoproj.io/v1alpha1", "Workflow"
OVER = ("Succeeded", "Failed", "Error")
SHUT_DOWN = ("Stop", "Terminate")


@dataclass(frozen=True)
class Workflow:
    """One in this pod's namespace."""

    name: str
    uid: str

    def reference(self) -> dict[str, Any]:
        """As an owner; Kubernetes takes but one that is the controller."""
        return {"apiVersion": API_VERSION, "kind": KIND, "name": self.name, "uid": self.uid, "controller": False}

    def is_ending(self) -> bool:
        """Whether it is over, being deleted or being stopped; False in doubt, for then `fineloop reap` will know.

        Kubeflow stops a run by taking all its time away (2.17, apiserver/resource/resource_manager.go,
        TerminateWorkflow); `argo stop` and `argo terminate` say so themselves.
        """
        try:
            found = KubernetesApi(own_namespace()).workflow(self.name, timeout_s=QUICK_S)
        except FineloopError as exc:
            logger.warning("whether the run goes on is not known: %s", exc)
            return False
        if found is None or found["metadata"].get("deletionTimestamp"):
            return True
        spec, status = found.get("spec") or {}, found.get("status") or {}
        return (
            spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown") in SHUT_DOWN or status.get("phase") in OVER
        )


def own_workflow() -> Workflow | None:
    """The workflow of the pod that this process runs in; None outside Kubeflow, or where Kubernetes does not say."""
    pod = os.environ.get("KFP_POD_NAME", "")
    if not pod or not own_namespace():
        return None
    try:
        owners = [owner for owner in KubernetesApi(own_namespace()).pod_owners(pod) if owner["kind"] == KIND]
    except FineloopError as exc:
        logger.warning("which run this pod belongs to is not known: %s", exc)
        return None
    return Workflow(owners[0]["name"], owners[0]["uid"]) if owners else None
