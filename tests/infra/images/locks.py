"""The images' locks, read as what they pin, and what may be wrong with one."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "infra" / "images"
# What the images run on, wherever the tests run.
PLATFORM = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.9",
    "python_version": "3.11",
    "sys_platform": "linux",
}
_PIN = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+) \\\n(?P<hashes>(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)


def text_of(lock: str) -> str:
    return (IMAGES / f"{lock}.lock").read_text(encoding="utf-8")


def pins(text: str) -> dict[str, str]:
    """Each hashed requirement's canonical name, to its version."""
    return {canonicalize_name(pin["name"]): pin["version"] for pin in _PIN.finditer(text)}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for on the images' platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in texts]


def unhashed(text: str) -> Iterator[str]:
    """Whatever is neither a comment nor a requirement with its hashes: options, URLs, indexes, bare requirements."""
    for line in _PIN.sub("", text).splitlines():
        if line.strip() and not line.startswith("#"):
            yield f"{line.strip()} is no hashed requirement"
    if re.search(r"\w+://|index-url|find-links", text):
        yield "an address is in it: a lock must not say where packages come from"


def disagreeing(text: str, others: dict[str, str]) -> Iterator[str]:
    """Versions that are not those of `others`, where both have one."""
    for name, version in pins(text).items():
        if name in others and others[name] != version:
            yield f"{name}=={version}, elsewhere {others[name]}"


def uncovered(text: str, wanted: list[Requirement]) -> Iterator[str]:
    """Requirements that the lock does not satisfy, followed through the metadata of what is installed here.

    What is not installed, such as CUDA's libraries beside a CPU torch, ends its branch.
    """
    locked = pins(text)
    pending, seen = [(requirement, "pyproject.toml") for requirement in wanted], set()
    while pending:
        requirement, by = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in locked:
            yield f"{name}, which {by} needs, is missing"
        elif not requirement.specifier.contains(locked[name], prereleases=True):
            yield f"{name}=={locked[name]} is not the {requirement.specifier} that {by} needs"
        pending += [(found, name) for found in _requirements(name, requirement.extras)]


def _requirements(name: str, extras: set[str]) -> Iterator[Requirement]:
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for text in texts:
        requirement = Requirement(text)
        if not requirement.marker or any(requirement.marker.evaluate({**PLATFORM, "extra": e}) for e in ("", *extras)):
            yield requirement
