"""Both images, built once for the tests of the podman tier, on stand-ins for base images that are only in a registry.

FINELOOP_STEP_IMAGE and FINELOOP_TRAIN_IMAGE name images that exist and are taken instead: those of `make images`.
"""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.infra.images.containers import LIMITS, STEP, TRAIN, podman

PACKAGES = "python3,python3-pip,python3-venv,python-is-python3,ca-certificates,sudo"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# What FROM gets in place of the digest of a base that `--from` replaces; and the commit.
ARGUMENTS = {"PYTHON_DIGEST": f"sha256:{'0' * 64}", "RAY_DIGEST": f"sha256:{'0' * 64}", "REVISION": "c0ffee42" * 5}


def tag(image: str) -> str:
    """A name that no other process on this machine gives or removes."""
    return f"localhost/fineloop-test-{image}:{os.getpid()}"


def build(dockerfile: str, *, base: str, name: str) -> Iterator[str]:
    """Build it on another base than its own; remove it at the end."""
    arguments = [f"--build-arg={argument}={value}" for argument, value in ARGUMENTS.items()]
    options = ("--network", "host", "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro", *LIMITS)
    podman("build", "--layers=false", "--file", dockerfile, "--from", base, "--tag", name, *arguments, *options, ".")
    yield name
    podman("image", "rm", "--force", "--ignore", name)


@pytest.fixture(scope="session")
def python_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian bookworm, which has a Python of the images' minor version."""
    scratch, name = tmp_path_factory.mktemp("debian"), tag("python")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(scratch / "root")]
    subprocess.run(command, check=True, capture_output=True)
    for marker in (scratch / "root").glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # Python's own base image has no such marker
    subprocess.run(["tar", "--directory", "root", "--create", "--file", "root.tar", "."], cwd=scratch, check=True)
    podman("import", str(scratch / "root.tar"), name)
    yield name
    podman("image", "rm", "--force", "--ignore", name)


@pytest.fixture(scope="session")
def ray_base(python_base: str) -> Iterator[str]:
    """The same with Ray's user and a Python of that user's own."""
    yield from build("tests/infra/images/ray_base.Dockerfile", base=python_base, name=tag("ray"))


@pytest.fixture(scope="session")
def step_image(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from given_or_built(STEP, "step", "python_base", request)


@pytest.fixture(scope="session")
def train_image(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from given_or_built(TRAIN, "train", "ray_base", request)


def given_or_built(variable: str, image: str, base: str, request: pytest.FixtureRequest) -> Iterator[str]:
    if given := os.environ.get(variable):
        yield given
    else:
        dockerfile = f"infra/images/{image}.Dockerfile"
        yield from build(dockerfile, base=request.getfixturevalue(base), name=tag(image))
