"""The lineage record of a version: enough to know what an adapter was made from, and to make it again.

Functions that read this machine say so; the rest is pure. Secrets cannot get in: the config holds none, and a git URL
is kept without user and password.
"""

import hashlib
import json
import logging
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from components.config.schema import RunConfig
from components.shared.errors import UserError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Base:
    """The frozen base model."""

    reference: str
    """The model's name in the config."""
    identity: Mapping[str, Any]
    """What fixes its bytes: a commit, or files with their sha256."""


@dataclass(frozen=True)
class Asked:
    """What a run was asked for: its whole config, as JSON values."""

    adapter: str
    method: str
    config: Mapping[str, Any]
    config_sha256: str

    @classmethod
    def of(cls, config: RunConfig) -> "Asked":
        """What this config asks for."""
        return cls(config.adapter.name, config.method.name, config.model_dump(mode="json"), config.digest)


@dataclass(frozen=True)
class Dataset:
    """The prepared dataset that the adapter was trained on."""

    dataset_id: str
    uri: str
    manifest_sha256: str
    train_records: int
    eval_records: int
    tokens: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the tokens that were read, by the name of their folder beside the dataset, for audits: see
    `Manifest.content_sha256`."""


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
    """The software that the run ran on. `code` is None if there is neither a git checkout nor an image that names its
    commit; `image` is empty if no container names its image."""

    python: str
    platform: str
    packages: Mapping[str, str]
    """Version of every installed package, by its normalised name."""
    code: Code | None = None
    image: str = ""


@dataclass(frozen=True)
class Hardware:
    """Hardware of the training; all workers have the same."""

    cpu: str
    """Model of the CPU."""
    cpus_per_worker: int
    workers: int
    gpu: str = ""
    """Model of each worker's GPU; empty if the training ran on CPUs."""


@dataclass(frozen=True)
class Started:
    """Who started a training, and as which run and job; empty means unknown."""

    user: str = ""
    """Account name of the user whose process submitted the training; never a credential."""
    kfp_run_id: str = ""
    submission_id: str = ""
    """Submission id of the Ray job, or the RayJob's id; `ray_job_id` is the cluster's number for the job."""
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
    """URI of the checkpoint that the run resumed from; empty if it started afresh."""
    more: Mapping[str, Any] = field(default_factory=dict)


def build_lineage(
    asked: Asked,
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
    """Return the lineage record as plain JSON values.

    `recipe` is what was built rather than what was asked for (resolved target modules, trainable parameters); `parents`
    are the URIs of the versions that this one was trained from; `sources` maps the files and objects that were read to
    their fingerprints.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "adapter": asked.adapter,
        "config": dict(asked.config),
        "config_sha256": asked.config_sha256,
        "base": {"reference": base.reference, "identity": dict(base.identity)},
        "dataset": asdict(dataset),
        "sources": dict(sources),
        "environment": asdict(environment),
        "hardware": asdict(hardware),
        "started": asdict(started),
        "recipe": {"method": asked.method, **recipe},
        "training": asdict(training),
        "parents": list(parents),
    }


def environment(directory: Path, *, image: str = "", revision: str = "") -> Environment:
    """Return the environment of this process; `directory` is where its code lies.

    `revision` says what an image without a checkout was built from: a commit, then -dirty if files differed.
    """
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=installed_packages(),
        code=code_of(directory) or code_of_image(revision),
        image=image,
    )


def installed_packages() -> dict[str, str]:
    """Return each installed distribution's version, by normalised name (PEP 503); the first on the path counts."""
    # Packages that another one vendors are not installed: importing Ray puts a folder of them on the path.
    where = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    found: dict[str, str] = {}
    for each in metadata.distributions(path=where):
        name: str | None = each.metadata["Name"]  # None for a folder that an interrupted installation left
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return dict(sorted(found.items()))


def cpu_model() -> str:
    """Return the CPU's model as Linux names it, otherwise its architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        described = ""
    named = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def code_of(directory: Path) -> Code | None:
    """Return commit and state of the git checkout that holds `directory`; None without a checkout, commit or git."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    dirty = bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))
    return Code(commit, dirty, without_credentials(_git(directory, "remote", "get-url", "origin") or ""))


def code_of_image(revision: str) -> Code | None:
    """Return the code that an image was built from; None if `revision` names no commit."""
    commit, _, changed = revision.partition("-")
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        return None
    return Code(commit, dirty=changed == "dirty")


def without_credentials(url: str) -> str:
    """Return the URL without user and password."""
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


# Lineage in both directions: what a version was made from, and which versions were made from a thing.

logger = logging.getLogger(__name__)

Kind = Literal["dataset", "source", "base", "commit", "config", "parent"]

BASE_FIELDS = ("stands_on", "nf4_copy")
"""Fields of a lineage's recipe that name a base: the one that the adapter was trained on, and its copy in NF4, which is
no longer made."""


@dataclass(frozen=True)
class Ancestor:
    """Something that a version was made from."""

    kind: Kind
    name: str
    """The name, by the kind: a dataset's id, a source's name, a base as the config names it or the URI of one
    that Fineloop made, a commit, a config's sha256, a version's URI."""


def parse_terms(terms: Iterable[str]) -> dict[Kind, str]:
    """Parse KIND=NAME terms, each kind once, for `descendants`.

    Raises:
        UserError: a term is not of that form, or of an unknown kind.
    """
    found: dict[Kind, str] = {}
    for term in terms:
        kind, _, name = term.partition("=")
        if kind not in get_args(Kind) or not name:
            raise UserError(f"--of {term}: write KIND=NAME, where KIND is one of {', '.join(get_args(Kind))}")
        found[cast(Kind, kind)] = name
    return found


def of_record(lineage: Mapping[str, Any]) -> list[Ancestor]:
    """The ancestors that one lineage record names; a missing key names none."""

    def at(*path: str) -> Any:
        found: Any = lineage
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    configured = at("config", "data", "source") or []
    bases = dict.fromkeys([at("base", "reference"), *(at("recipe", field) for field in BASE_FIELDS)])
    sources = dict.fromkeys([*([configured] if isinstance(configured, str) else configured), *(at("sources") or ())])
    named: list[tuple[Kind, Any]] = [
        ("dataset", at("dataset", "dataset_id")),
        *[("source", source) for source in sources],
        *[("base", base) for base in bases],
        ("commit", at("environment", "code", "commit")),
        ("config", at("config_sha256")),
        *[("parent", parent) for parent in at("parents") or []],
    ]
    return [Ancestor(kind, str(name)) for kind, name in named if name]


OF_THE_START = ("start_from", "start_share")
"""Keys of section `train` that say where a training starts, and what share of it stays."""


def trained(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return the dataset, the parent version (empty if none) and the sha256 of the config without its start."""
    config, parents = _section(lineage, "config"), lineage.get("parents")
    train = {key: value for key, value in _section(config, "train").items() if key not in OF_THE_START}
    return {
        "dataset": str(_section(lineage, "dataset").get("dataset_id", "")),
        "parent": str(next(filter(None, parents), "")) if isinstance(parents, list) else "",
        "config": hashlib.sha256(json.dumps({**config, "train": train}, sort_keys=True).encode()).hexdigest(),
    }


def _section(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a section; empty if it is not a mapping, since anyone who may publish may write any lineage."""
    found = of.get(key)
    return found if isinstance(found, Mapping) else {}
