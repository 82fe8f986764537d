"""The lineage record of a version: enough to know what an adapter was made from, and to make it again.

Secrets cannot get in: the config holds none, and a git URL is kept without user and password.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from components.config.schema import RunConfig
from components.shared.errors import UserError


@dataclass(frozen=True)
class Base:
    """The frozen base model."""

    reference: str
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


UNKNOWN_STARTER = Started()


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


@dataclass(frozen=True)
class Lineage:
    """The whole record of one version."""

    asked: Asked
    run_id: str
    base: Base
    dataset: Dataset
    environment: Environment
    hardware: Hardware
    recipe: Mapping[str, Any]
    """What was built rather than what was asked for, such as resolved target modules."""
    training: Training
    started: Started = UNKNOWN_STARTER
    parents: Sequence[str] = ()
    """URIs of the versions that this one was trained from."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the files and objects that were read, by name."""

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        requested = record.pop("asked")
        record["recipe"] = {"method": requested.pop("method"), **self.recipe}
        return {"schema_version": 1, **requested, **record, "parents": list(self.parents)}


def environment(directory: Path, *, image: str = "", revision: str = "") -> Environment:
    """Return the environment of this process; `directory` is where its code lies.

    `revision` says what an image without a checkout was built from: a commit, then -dirty if files differed.
    """
    # Packages that another one vendors are not installed: importing Ray puts a folder of them on the path.
    where = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    packages: dict[str, str] = {}
    for installed in metadata.distributions(path=where):
        name: str | None = installed.metadata["Name"]  # None for a folder that an interrupted installation left
        if name:  # normalised as in PEP 503; the first on the path counts
            packages.setdefault(re.sub(r"[-_.]+", "-", name).lower(), installed.version)
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=dict(sorted(packages.items())),
        code=code_of(directory) or code_of_image(revision),
        image=image,
    )


def code_of(directory: Path) -> Code | None:
    """Return commit and state of the git checkout that holds `directory`; None without a checkout, commit or git."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(directory), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return Code(commit, dirty, without_credentials(git("remote", "get-url", "origin") or ""))


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


Kind = Literal["dataset", "source", "base", "commit", "config", "parent"]


@dataclass(frozen=True)
class Ancestor:
    """Something that a version was made from."""

    kind: Kind
    name: str
    """The name, by the kind: a dataset's id, a source's name, a base as the config names it or the URI of one
    that Fineloop made, a commit, a config's sha256, a version's URI."""


def parse_terms(terms: Iterable[str]) -> dict[Kind, str]:
    """Parse KIND=NAME terms, each kind once, for `descendants`. Raises UserError if a term is not of that form, or of
    an unknown kind."""
    by_kind: dict[Kind, str] = {}
    for term in terms:
        kind, _, name = term.partition("=")
        if kind not in get_args(Kind) or not name:
            raise UserError(f"--of {term}: write KIND=NAME, where KIND is one of {', '.join(get_args(Kind))}")
        by_kind[cast(Kind, kind)] = name
    return by_kind


def of_record(lineage: Mapping[str, Any]) -> list[Ancestor]:
    """The ancestors that one lineage record names; a missing key names none."""
    configured = _at(lineage, "config", "data", "source") or []
    bases = dict.fromkeys([_at(lineage, "base", "reference"), _at(lineage, "recipe", "stands_on")])
    sources = [configured] if isinstance(configured, str) else configured
    named: list[tuple[Kind, Any]] = [
        ("dataset", _at(lineage, "dataset", "dataset_id")),
        *[("source", source) for source in dict.fromkeys([*sources, *(_at(lineage, "sources") or ())])],
        *[("base", base) for base in bases],
        ("commit", _at(lineage, "environment", "code", "commit")),
        ("config", _at(lineage, "config_sha256")),
        *[("parent", parent) for parent in _at(lineage, "parents") or []],
    ]
    return [Ancestor(kind, str(name)) for kind, name in named if name]


def _at(lineage: Mapping[str, Any], *path: str) -> Any:
    """The value there; None if there is none, since anyone who may publish may write any lineage."""
    value: Any = lineage
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
