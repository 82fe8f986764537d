"""Images under podman: built from their Dockerfiles, run as the manifests run them: nothing writable but tmpfs."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STEP, TRAIN = "FINELOOP_STEP_IMAGE", "FINELOOP_TRAIN_IMAGE"
"""Variables that name images to try instead of building them."""
NEEDED = ("podman", "runc", *(() if {STEP, TRAIN} <= os.environ.keys() else ("debootstrap", "tar")))
# Within what this process may have: podman asks for more by default.
LIMITS = tuple(
    "--ulimit={}={}:{}".format(name, *resource.getrlimit(number))
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
)
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# What FROM gets in place of the digest of a base that `--from` replaces.
ARGUMENTS = {"PYTHON_DIGEST": f"sha256:{'0' * 64}", "RAY_DIGEST": f"sha256:{'0' * 64}", "REVISION": "c0ffee42" * 5}
LOCKED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges")
"""The securityContext of a container in the manifests."""
IMPORT_ALL = """
import importlib, pkgutil, sys
names = []
for package in map(importlib.import_module, sys.argv[1:]):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        names.append(module.name)
heavy = {"torch", "transformers", "peft"} & set(sys.modules)
print(len(names), sorted(heavy))
"""

Done = subprocess.CompletedProcess[str]

missing = [program for program in NEEDED if shutil.which(program) is None]
podman_tier = [
    pytest.mark.podman,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap makes a base image as root alone"),
]


def podman(*arguments: str, check: bool = True, environment: Mapping[str, str] | None = None) -> Done:
    """With runc and cgroupfs, which work also where crun and systemd do not."""
    done = subprocess.run(
        ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def tag(image: str) -> str:
    """A name that no other process on this machine gives or removes."""
    return f"localhost/fineloop-test-{image}:{os.getpid()}"


def build(dockerfile: str, *, base: str, name: str) -> str:
    """Build it on another base than its own; returns the name."""
    text = (ROOT / dockerfile).read_text(encoding="utf-8")
    asked = {name: value for name, value in ARGUMENTS.items() if f"ARG {name}" in text}
    arguments = [part for name, value in asked.items() for part in ("--build-arg", f"{name}={value}")]
    trust = f"{CERTIFICATES}:{CERTIFICATES}:ro"
    podman(
        *("build", "--layers=false", "--file", dockerfile, "--from", base, "--tag", name, *arguments),
        *("--network", "host", "--volume", trust, *LIMITS, "."),
    )
    return name


def remove(*images: str) -> None:
    podman("image", "rm", "--force", "--ignore", *images)


def run(image: str, *command: str) -> Done:
    """As the manifests run it; and without a network, which an import must not need."""
    return podman("run", "--rm", *LIMITS, *LOCKED, "--tmpfs", "/tmp", "--network", "none", image, *command, check=False)


def on_loopback(environment: Mapping[str, str], *, scratch: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a container that shares this machine's loopback, and is locked for the rest.

    `environment` must be given to `podman` as well: it takes the values from there, so that no secret is an argument.
    `scratch` has the folders that an emptyDir would be, with the size of each.
    """
    mounts = [part for path, size in scratch.items() for part in ("--tmpfs", f"{path}:rw,exec,mode=1777,size={size}")]
    names = [part for name in environment for part in ("--env", name)]
    return (*LIMITS, *LOCKED, "--network", "host", "--http-proxy=false", *mounts, *names)


@contextlib.contextmanager
def running(image: str, *command: str, options: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[str]:
    """A container in the background, by its id; gone at the end."""
    container = podman("run", "--detach", *options, image, *command, environment=environment).stdout.strip()
    try:
        yield container
    finally:
        podman("rm", "--force", "--time", "0", container)
