"""The step image holds what its code imports: here with nothing visible but what its lock would install."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.images.locks import ROOT, pins, text_of

PACKAGES = ("components", "pipelines")
IMPORT_WITH_LOCK = """
import importlib, importlib.abc, importlib.machinery, importlib.metadata, json, re, site, sys

asked = json.load(sys.stdin)
owners = importlib.metadata.packages_distributions()

def is_hidden(module):
    names = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(module, ())}
    return bool(names) and "fineloop" not in names and not names & set(asked["locked"])

class OnlyLocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and is_hidden(name):
            # Ray brings copies of some packages in folders of its own.
            elsewhere = [folder for folder in sys.path if folder not in site.getsitepackages()]
            spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return spec

sys.meta_path.insert(0, OnlyLocked())
missing = {}
for name in asked["modules"]:
    try:
        importlib.import_module(name)
    except ImportError as exc:
        missing[name] = str(exc)
print(json.dumps(missing))
"""


def missing(modules: set[str], locked: set[str]) -> dict[str, str]:
    """Which of the modules a new process cannot import when it sees only the locked distributions, and why."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_LOCK],
        input=json.dumps({"modules": sorted(modules), "locked": sorted(locked)}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_anywhere(path: Path) -> set[str]:
    """Top-level modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_imported_with_what_the_step_lock_installs(package: str) -> None:
    modules = {module_of(path) for path in files(package)}
    assert len(modules) > 10
    assert missing(modules, pins(text_of("step")).keys()) == {}


def test_what_is_imported_inside_functions_is_in_the_step_lock_too() -> None:
    modules = set().union(*(imported_anywhere(path) for package in PACKAGES for path in files(package)))
    assert {"boto3", "kfp", "pyarrow", "ray", "simple_icd_10_cm"} <= modules
    modules -= {"vllm"}  # imported by a plugin of vLLM's, which runs beside it
    assert missing(modules, pins(text_of("step")).keys()) == {}


@pytest.mark.parametrize(
    ("distribution", "module"),
    [("pydantic", "components.config.schema"), ("docstring-parser", "components.gate.component")],
)
def test_a_distribution_that_the_lock_lacks_is_noticed(distribution: str, module: str) -> None:
    locked = pins(text_of("step")).keys() - {distribution}
    assert f"No module named '{distribution.replace('-', '_')}" in missing({module}, locked)[module]
