"""Parsing of `model.base`, in one place, so that all commands accept the same references.

hub id               NAME or OWNER/NAME, with model.revision
local folder         a path; ~ is the user's home
s3://BUCKET/FOLDER   a folder in S3
pkg://PACKAGE/FILE   a GGUF that an installed Python package ships
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from components.shared.errors import ConfigError


@dataclass(frozen=True)
class HubId:
    """A model on the hub."""

    name: str


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    path: Path


@dataclass(frozen=True)
class S3Folder:
    """A folder in S3."""

    uri: str


@dataclass(frozen=True)
class PackagedGguf:
    """A GGUF in an installed package."""

    package: str
    file: str
    path: Path


def parse(reference: str) -> HubId | LocalFolder | S3Folder | PackagedGguf:
    """Parse a reference.

    Raises:
        ConfigError: it has no known form, or names a folder or a package file that does not exist.
    """
    if reference.startswith("pkg://"):
        return _packaged(reference)
    if reference.startswith("s3://"):
        return S3Folder(reference)
    if "://" in reference:
        raise ConfigError(f"model.base {reference!r}: expected a hub id, a local folder, s3://... or pkg://...")
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return LocalFolder(folder)
    if folder.is_absolute() or reference.startswith("."):
        raise ConfigError(f"model.base {reference}: there is no such folder")
    return HubId(reference)


def _packaged(reference: str) -> PackagedGguf:
    package, _, file = reference.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.base {reference}: the Python package {package!r} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if path.suffix != ".gguf" or not path.is_file():
        held = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*.gguf"))
        raise ConfigError(f"model.base {reference}: package {package!r} holds no {file!r}; its GGUF files are {held}")
    return PackagedGguf(package, file, path)
