"""The lineage record of a version: enough to know what an adapter was made from, and to make it again.

What reads this machine says so; the rest is pure. Secrets cannot get in: the config holds none, and of a git address
only what stands beside user and password is kept.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from components.config.schema import RunConfig

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Base:
    """The frozen base model."""

    reference: str
    """As the config names it."""
    identity: Mapping[str, Any]
    """What fixes its bytes: a commit, or files with their sha256."""


@dataclass(frozen=True)
class Dataset:
    """The prepared dataset that the adapter was trained on."""

    dataset_id: str
    uri: str
    manifest_sha256: str
    train_records: int
    eval_records: int


@dataclass(frozen=True)
class Code:
    """The checkout that ran, or that the image which ran was built from."""

    commit: str
    dirty: bool
    """Whether tracked files differed from the commit."""
    url: str = ""
    """The remote named origin; empty without one."""


@dataclass(frozen=True)
class Environment:
    """What the run ran on. `code` is None outside a git checkout and an image that names its commit; `image` is empty
    where no container names its own."""

    python: str
    platform: str
    packages: Mapping[str, str]
    """Everything that is installed, by its name as PyPI spells it."""
    code: Code | None = None
    image: str = ""


@dataclass(frozen=True)
class Hardware:
    """What the training computed on; workers are alike."""

    cpu: str
    """Model of the processor."""
    cpus_per_worker: int
    workers: int
    gpu: str = ""
    """Model of the worker's GPU; empty where it trained on processors."""


@dataclass(frozen=True)
class Started:
    """Who started a training, and as which run and job; empty where unknown."""

    user: str = ""
    """Whose process submitted it: an account's name, never what proves it."""
    kfp_run_id: str = ""
    submission_id: str = ""
    """Of the Ray job, or the RayJob's own; `ray_job_id` is the cluster's number for it."""
    ray_job_id: str = ""


NOBODY_SAID = Started()


@dataclass(frozen=True)
class Training:
    """How the training went. Losses are mean nats per answer token; None where none was measured."""

    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    wall_s: float
    world_size: int
    started_at: str = ""
    resumed_from: str = ""
    """URI of the checkpoint that the run went on from; empty when it started afresh."""
    more: Mapping[str, Any] = field(default_factory=dict)


def build_lineage(
    config: RunConfig,
    *,
    run_id: str,
    base: Base,
    dataset: Dataset,
    environment: Environment,
    hardware: Hardware,
    recipe: Mapping[str, Any],
    training: Training,
    started: Started = NOBODY_SAID,
    parents: Sequence[str] = (),
    sources: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The record as plain JSON values.

    `recipe` is what was built rather than what was asked for (resolved target modules, trainable parameters); `parents`
    are the URIs of the versions that this one grew from; `sources` the files and objects that were read, each with its
    fingerprint.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "adapter": config.adapter.name,
        "config": config.model_dump(mode="json"),
        "config_sha256": config.digest,
        "base": {"reference": base.reference, "identity": dict(base.identity)},
        "dataset": asdict(dataset),
        "sources": dict(sources),
        "environment": asdict(environment),
        "hardware": asdict(hardware),
        "started": asdict(started),
        "recipe": {"method": config.method.name, **recipe},
        "training": asdict(training),
        "parents": list(parents),
    }


def environment(directory: Path, *, image: str = "", revision: str = "") -> Environment:
    """The environment of this process; `directory` is where its code lies.

    `revision` is what an image, which holds no checkout, was built from: a commit, then -dirty where files differed.
    """
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=installed_packages(),
        code=code_of(directory) or code_of_image(revision),
        image=image,
    )


def installed_packages() -> dict[str, str]:
    """Version of every installed distribution, by its normalised name (PEP 503); the first on the path counts."""
    # What a package carries for itself is not installed: importing Ray puts a folder of such on the path.
    where = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    found: dict[str, str] = {}
    for each in metadata.distributions(path=where):
        name: str | None = each.metadata["Name"]  # None of a folder that an interrupted installation left
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return dict(sorted(found.items()))


def cpu_model() -> str:
    """The processor's model as Linux names it, else its architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = ""
    named = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def code_of(directory: Path) -> Code | None:
    """Commit and state of the git checkout that `directory` lies in; None without a checkout, commit or git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    dirty = bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))
    return Code(commit, dirty, without_credentials(_git(directory, "remote", "get-url", "origin") or ""))


def code_of_image(revision: str) -> Code | None:
    """The code of an image by its revision; None where that names no commit."""
    commit, _, changed = revision.partition("-")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        return None
    return Code(commit, dirty=changed == "dirty")


def without_credentials(url: str) -> str:
    """The address without user and password."""
    parts = urlsplit(url)
    if not parts.scheme or "@" not in parts.netloc:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
