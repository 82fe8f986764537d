"""The step image itself: built from its Dockerfile on a Debian base with the same Python, and run as a cluster runs it.

Opt-in, as root: `pytest -m podman`. Needs podman, runc and debootstrap, Debian's mirror and PyPI; no image registry.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NEEDED = ("podman", "runc", "debootstrap", "tar")
BASE, IMAGE = "localhost/fineloop-test-base:bookworm", "localhost/fineloop-test-step:1"
# Within what this process may have: podman asks for more by default.
LIMITS = tuple(
    "--ulimit={}={}:{}".format(name, *resource.getrlimit(number))
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
)
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
IMPORT_ALL = """
import importlib, pkgutil, sys
names = []
for package in map(importlib.import_module, ("components", "pipelines")):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        names.append(module.name)
heavy = {"torch", "transformers", "peft"} & set(sys.modules)
print(len(names), sorted(heavy))
"""

missing = [program for program in NEEDED if shutil.which(program) is None]
pytestmark = [
    pytest.mark.podman,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap makes a base image as root alone"),
]


def podman(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("base") / "root"
    include = "--include=python3,python3-pip,python-is-python3,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", root], check=True, capture_output=True)
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # Python's own base image has no such marker
    archive = root.with_suffix(".tar")
    subprocess.run(["tar", "--directory", root, "--create", "--file", archive, "."], check=True)
    podman("import", str(archive), BASE)
    trust = f"{CERTIFICATES}:{CERTIFICATES}:ro"
    podman(
        *("build", "--file", "infra/images/step.Dockerfile", "--from", BASE, "--tag", IMAGE),
        *("--build-arg", f"PYTHON_DIGEST=sha256:{'0' * 64}", "--network", "host", "--volume", trust),
        *(*LIMITS, "."),
    )
    yield IMAGE
    podman("image", "rm", "--force", IMAGE, BASE)


def run(image: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """As the manifests run it, with nothing writable but /tmp; and without a network, which an import must not need."""
    closed = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "all")
    return podman(
        "run",
        "--rm",
        *LIMITS,
        *closed,
        "--security-opt",
        "no-new-privileges",
        image,
        *command,
        check=False,
    )


def test_every_module_is_imported_without_network_on_a_read_only_root(image: str) -> None:
    done = run(image, "python", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    number, heavy = done.stdout.split(maxsplit=1)
    assert int(number) > 50
    assert heavy.strip() == "[]"


def test_it_runs_as_uid_1000_and_cannot_change_the_code(image: str) -> None:
    assert run(image, "id", "-u").stdout.strip() == "1000"
    assert run(image, "sh", "-c", "touch /tmp/written && ! touch /app/components/x && ! touch /x").returncode == 0
    found = podman("run", "--rm", *LIMITS, image, "sh", "-c", "touch /app/components/x", check=False)
    assert "Permission denied" in found.stderr  # on a writable root too


def test_it_holds_the_command_line_and_the_built_in_data(image: str) -> None:
    assert "usage: fineloop" in run(image).stdout
    assert "usage: fineloop compile" in run(image, "python", "-m", "pipelines.cli", "compile", "--help").stdout
    done = run(image, "python", "-c", "import simple_icd_10_cm as icd; print(icd.get_description('A00'))")
    assert done.stdout.strip() == "Cholera", done.stderr


def test_it_compiles_the_pipeline_of_the_built_in_example(image: str) -> None:
    done = run(image, "sh", "-c", "python -m pipelines.cli compile -o /tmp/pipeline.yaml && cat /tmp/pipeline.yaml")
    assert "pipelineInfo:" in done.stdout, done.stderr


def test_nothing_but_the_code_and_the_locks_is_in_it(image: str) -> None:
    done = run(image, "sh", "-c", "ls -A /app /locks && find /app -name '*.md' -o -name '.git*'")
    assert done.stdout.split() == ["/app:", "components", "pipelines", "/locks:", "build.lock", "step.lock"]
