"""The manifests of infra/, rendered as `kubectl apply -k` would send them."""

import copy
import subprocess
import sys
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


def render_overlay(overlay: str) -> list[Manifest]:
    """The objects of an overlay and of both that go with it: all that policies hold for."""
    return [manifest for part in PARTS for manifest in render(f"infra/overlays/{overlay}/{part}".rstrip("/"))]


@cache
def _rendered(folder: str) -> list[Manifest]:
    done = subprocess.run([KUBECTL, "kustomize", ROOT / folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{folder}: {done.stderr.strip()}")
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=Loader) if manifest]


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> Iterator[Manifest]:
    """Those of some kinds."""
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def title(manifest: Manifest) -> str:
    """What to call it in a message."""
    return f"{manifest['kind']}/{manifest['metadata'].get('name', '?')}"
