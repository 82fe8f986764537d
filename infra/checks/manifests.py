"""The manifests of infra/, rendered as `kubectl apply -k` would send them."""

import copy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBECTL = Path(sys.executable).parent / "kubectl"
OVERLAYS = ("kind", "gpu", "aws")
PARTS = ("", "rayjob", "raycluster")
"""An overlay is applied once; its two others are created by people who want a run or a cluster of their own."""
OBSERVABILITY = "- ../../observability"
"""A line of each overlay, as a comment until somebody has the Prometheus Operator."""
TRACKER = "- ../../network/tracker"
"""A line of each overlay, as a comment until somebody has an MLflow in the cluster."""
PROFILE = "- ../../kubeflow/profile"
"""A line of the overlays of real clusters, as a comment unless their Kubeflow serves several namespaces."""
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # five times faster, where PyYAML was built with libyaml


def overlay_folders() -> list[str]:
    """Every folder that somebody applies, relative to the repository."""
    return [f"infra/overlays/{overlay}/{part}".rstrip("/") for overlay in OVERLAYS for part in PARTS]


def render(folder: str) -> list[Manifest]:
    """The objects of one folder with a kustomization; the caller may change them.

    Raises:
        ValueError: kustomize refuses it; the message is kustomize's.
    """
    return copy.deepcopy(_rendered(folder))


def render_overlay(overlay: str, line: str = "") -> list[Manifest]:
    """The objects of an overlay and of both that go with it, which is all that policies hold for.

    Args:
        overlay: its name.
        line: one that is a comment in it, and is none for this.
    """
    own = copy.deepcopy(_rendered_with(overlay, line)) if line else render(f"infra/overlays/{overlay}")
    parts = [part for part in PARTS if part and (INFRA / "overlays" / overlay / part).is_dir()]
    return own + [manifest for part in parts for manifest in render(f"infra/overlays/{overlay}/{part}")]


@cache
def _rendered_with(overlay: str, line: str) -> list[Manifest]:
    with tempfile.TemporaryDirectory() as scratch:
        infra = shutil.copytree(INFRA, Path(scratch) / "infra")
        path = infra / "overlays" / overlay / "kustomization.yaml"
        taken_in = path.read_text(encoding="utf-8").replace(f"# {line}", line)
        path.write_text(taken_in, encoding="utf-8")
        return _rendered(str(path.parent))


@cache
def _rendered(folder: str) -> list[Manifest]:
    done = subprocess.run([KUBECTL, "kustomize", ROOT / folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{folder}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=Loader) if manifest]


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> Iterator[Manifest]:
    """The manifests of some kinds."""
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def title(manifest: Manifest) -> str:
    """The name of a manifest in messages."""
    return f"{manifest['kind']}/{manifest['metadata'].get('name', '?')}"
