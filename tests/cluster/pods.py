"""Pods of the tests' own on a live cluster."""

from typing import Any

STEP = {"pipelines.kubeflow.org/v2_component": "true"}
"""The label by which the network policies know a step."""


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
