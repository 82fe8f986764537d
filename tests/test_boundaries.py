"""What may be loaded where, and what the words of the repository promise: commands and targets."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import grimp
import pytest

from components.config import config_file
from docs.generate import commands
from pipelines import cli
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.server import job_environment
from tests.documents import DOCUMENTS, commands_in

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("components", "pipelines", "ray_jobs")

JOBS = (
    "prepare",
    "candidate",
    "finetune",
    "evaluate",
    "sweep",
    "chat",
    "serve",
    "export",
    "plan",
    "preview",
)
IMPORT_ALL = """
import contextlib, importlib, json, pkgutil, runpy, sys
_, package, *jobs = sys.argv
for job in jobs:
    sys.argv = [job, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"{package}.{job}", run_name="__main__", alter_sys=True)
package = importlib.import_module(package)
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
imported = [name for name in names if not name.endswith(".component")]
for name in imported:
    importlib.import_module(name)
print(json.dumps({"imported": imported, "loaded": sorted(sys.modules)}))
"""


@dataclass(frozen=True)
class Imported:
    """What a new process imported of a package, every top-level module it has then loaded, and what jobs' `--help`
    printed before."""

    modules: set[str]
    loaded: set[str]
    help: str


def import_all(package: str, *jobs: str) -> Imported:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, *jobs],
        cwd=ROOT,
        env={**os.environ, **job_environment(os.environ)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    found = json.loads(last)
    return Imported(set(found["imported"]), {name.partition(".")[0] for name in found["loaded"]}, printed)


@pytest.fixture(scope="module")
def ray_jobs() -> Imported:
    """In one process, as each would import torch anew."""
    return import_all("ray_jobs", *JOBS)


def module_names(package: str) -> set[str]:
    files = [path for path in (ROOT / package).rglob("*.py") if path.name != "component.py"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__") for name in modules} - {package}


def fineloop_commands() -> list[str]:
    return [command for document in DOCUMENTS for command in commands_in(document, "fineloop")]


def make_targets() -> list[str]:
    return [
        target
        for document in DOCUMENTS
        for command in commands_in(document, "make")
        for target in shlex.split(command)[1:]
        if "=" not in target
    ]


def test_no_component_loads_a_model_library_or_ray_or_kfp() -> None:
    components = import_all("components")
    assert components.modules == module_names("components")
    assert not components.loaded & {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "deepspeed",
        "accelerate",
        "ray",
        "kfp",
    }


def test_no_ray_job_loads_kfp(ray_jobs: Imported) -> None:
    assert ray_jobs.modules == module_names("ray_jobs")
    assert "torch" in ray_jobs.loaded
    assert "kfp" not in ray_jobs.loaded


@pytest.mark.parametrize("package", PACKAGES)
def test_our_top_level_names_are_ours_alone(package: str) -> None:
    assert set(metadata.packages_distributions().get(package, ["fineloop"])) == {"fineloop"}
    assert Path(str(import_module(package).__file__)).resolve() == ROOT / package / "__init__.py"


PASSED = {
    "prepare": "--run-id --decided",
    "sweep": "--run-id --dataset",
    "candidate": "--run-id --dataset --train-only",
    "evaluate": "--run-id --dataset --version --config-digest",
}
"""What steps pass to their jobs: components/*/."""


def test_every_entry_point_explains_itself(ray_jobs: Imported) -> None:
    usages = re.findall(r"^usage: python -m ray_jobs\.(\w+)(.*?)\n\n", ray_jobs.help, flags=re.DOTALL | re.MULTILINE)
    assert tuple(job for job, _ in usages) == JOBS
    taken = {job: set(re.findall(r"--[\w-]+", options)) for job, options in usages}
    for job, passed in PASSED.items():
        assert {"--config", "--set", *passed.split()} <= taken[job], job


def test_every_entry_point_that_a_component_starts_is_a_module() -> None:
    code = [
        path.read_text(encoding="utf-8") for top in ("components", "pipelines") for path in (ROOT / top).rglob("*.py")
    ]
    spelled = {name for text in code for name in re.findall(r"(?:-m |\")(ray_jobs\.\w+)", text)}
    by_task = {f"ray_jobs.{task}" for text in code for task in re.findall(r"submit_step\(\s*\w+, \"(\w+)\"", text)}
    assert by_task == {"ray_jobs.prepare", "ray_jobs.sweep", "ray_jobs.candidate", "ray_jobs.evaluate"}
    started = spelled | by_task
    assert started <= module_names("ray_jobs")


def test_nothing_imports_in_a_circle() -> None:
    """Imports for types alone count."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while leaves := {module for module, imported in below.items() if not imported & below.keys()}:
        below = {module: imported for module, imported in below.items() if module not in leaves}
    assert sorted(below) == []


@pytest.mark.parametrize("command", sorted(set(fineloop_commands())))
def test_every_fineloop_command_of_the_documents_exists(command: str) -> None:
    arguments = shlex.split(command)[1:]
    if " ".join(arguments) in known_commands():
        return  # named in passing, without what it needs
    options = cli.parser().parse_args(arguments)
    if "overrides" in options:
        # NAME is for the reader to fill in. None where a command makes a config, or keeps the one of before; mine.toml
        # is the reader's own.
        named = getattr(options, "config", None)
        config = DEFAULT_CONFIG if named is None or named.name == "mine.toml" else named
        config_file.load(config, [override.replace("NAME", "name") for override in options.overrides])


@functools.cache
def known_commands() -> set[str]:
    """Groups too."""
    named = [name.split()[1:] for name, _ in commands(cli.parser(), "fineloop")]
    return {" ".join(words[:length]) for words in named for length in range(1, len(words) + 1)}


@pytest.mark.parametrize("target", sorted(set(make_targets())))
def test_every_make_target_of_the_documents_exists(target: str) -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert target in rules
