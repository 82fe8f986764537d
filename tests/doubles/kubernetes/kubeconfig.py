"""Kubeconfigs of one user on one cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write(path: Path, cluster: Mapping[str, str], *, namespace: str, token: str = "", **user: Any) -> Path:
    """Write one that leads to a `cluster` and names a namespace; `user` is what else the user has. Gives its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": dict(cluster)}],
        "users": [{"name": "us", "user": {**({"token": token} if token else {}), **user}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "us", "namespace": namespace}}],
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
