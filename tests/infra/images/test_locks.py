"""The images install exactly what was tested here, and all that their code imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.checks.manifests import INFRA, ROOT

IMAGES = INFRA / "images"
LOCKS = ("build", "step", "train", "weights")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILES = {image: (IMAGES / f"{image}.Dockerfile").read_text(encoding="utf-8") for image in ("step", "train")}


def pins(path: Path) -> dict[str, str]:
    """The canonical name of each requirement that is pinned, to its version."""
    found = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


PINS = {lock: pins(IMAGES / f"{lock}.lock") for lock in LOCKS}
TESTED = pins(ROOT / "constraints.txt")


@pytest.mark.full
def test_the_locks_are_what_make_lock_writes_byte_for_byte(tmp_path: Path) -> None:
    """By uv: complete, hashed, within pyproject.toml's ranges, and with the versions of constraints.txt."""
    for lock in LOCKS:
        shutil.copy(IMAGES / f"{lock}.lock", tmp_path)
    make = ["make", "--old-file", ".venv/ready", f"BIN={Path(sys.executable).parent}", f"LOCKS={tmp_path}", "lock"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    if "Failed to fetch" in done.stderr:
        pytest.skip(f"no package index answers: {done.stderr.splitlines()[1]}")
    assert done.returncode == 0, done.stderr
    written = {lock: (tmp_path / f"{lock}.lock").read_bytes() for lock in LOCKS}
    assert [lock for lock in LOCKS if written[lock] != (IMAGES / f"{lock}.lock").read_bytes()] == [], "run `make lock`"


@pytest.mark.parametrize(("image", "extras"), [("step", ["hub", "openlineage"]), ("train", ["train"])])
def test_a_lock_agrees_with_the_constraints_and_holds_what_pyproject_asks_for(image: str, extras: list[str]) -> None:
    """What can be said of it without a package index."""
    locked = PINS[image] | PINS["build"] | PINS["weights"]
    assert {name: version for name, version in locked.items() if TESTED.get(name, version) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    wanted = [Requirement(text) for text in [*wanted, "simple-icd-10-cm"]]  # the built-in example
    assert [str(each) for each in wanted if locked.get(canonicalize_name(each.name), "0") not in each.specifier] == []


def test_ray_and_python_are_one_version_in_locks_and_base_images() -> None:
    (ray,) = re.findall(r"^FROM docker\.io/rayproject/ray:([\d.]+)-py(\d)(\d+)-gpu@", DOCKERFILES["train"], flags=re.M)
    python = re.findall(r"^FROM docker\.io/library/python:([\d.]+)-slim", DOCKERFILES["step"], flags=re.MULTILINE)
    assert {ray[0]} == {TESTED["ray"], PINS["step"]["ray"], PINS["train"]["ray"]}
    assert {f"{ray[1]}.{ray[2]}", *python} == set(re.findall(r"--python-version (\S+)", MAKEFILE))


@pytest.mark.parametrize("package", ["components", "pipelines"])
def test_what_the_step_image_imports_is_in_its_lock(package: str) -> None:
    """Inside functions too, but for vllm, beside which a plugin of its own runs, Presidio, which people add, and
    shtab, which completes commands in a shell where it is installed."""
    beside = {"fineloop", "vllm", "presidio-analyzer", "shtab"}
    owners, locked = metadata.packages_distributions(), {*PINS["step"], *beside}
    assert not locked & {"torch", "transformers", "peft"}
    imported = set().union(*(imported_by(path) for path in (ROOT / package).rglob("*.py"))) - sys.stdlib_module_names
    assert {"boto3", "kfp", "ray"} <= imported
    theirs = {name: {canonicalize_name(owner) for owner in owners.get(name, [name])} for name in imported}
    assert {name for name, by in theirs.items() if not by & locked} == set()


def imported_by(path: Path) -> set[str]:
    """Top-level modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}
