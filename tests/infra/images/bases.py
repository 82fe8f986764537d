"""Stand-ins for the base images, which are only in a registry: Debian bookworm has a Python of their minor version."""

import subprocess
from pathlib import Path

from tests.infra.images.containers import build, podman, tag

PYTHON, RAY = tag("python"), tag("ray")
PACKAGES = "python3,python3-pip,python3-venv,python-is-python3,ca-certificates,sudo"


def python(scratch: Path) -> str:
    """Install Debian below `scratch` and make it an image."""
    root, archive = scratch / "root", scratch / "root.tar"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()  # Python's own base image has no such marker
    subprocess.run(["tar", "--directory", root, "--create", "--file", archive, "."], check=True)
    podman("import", str(archive), PYTHON)
    archive.unlink()
    return PYTHON


def ray(base: str) -> str:
    """Make of it an image with Ray's user and a Python of that user's own."""
    return build("tests/infra/images/ray_base.Dockerfile", base=base, name=RAY)
