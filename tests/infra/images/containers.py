"""Images under podman, run as the manifests run them: nothing writable but tmpfs."""

import os
import resource
import shutil
import subprocess
from collections.abc import Mapping

import pytest

from infra.checks.manifests import ROOT

STEP, TRAIN = "FINELOOP_STEP_IMAGE", "FINELOOP_TRAIN_IMAGE"
"""Variables that name images to try instead of building them."""
NEEDED = ("podman", "runc", *(() if {STEP, TRAIN} <= os.environ.keys() else ("debootstrap", "tar")))
# Within what this process may have: podman asks for more by default.
LIMITS = tuple(
    "--ulimit={}={}:{}".format(name, *resource.getrlimit(number))
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
)
LOCKED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges")
"""The securityContext of a container in the manifests."""
missing = [program for program in NEEDED if shutil.which(program) is None]
podman_tier = [
    pytest.mark.podman,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap makes a base image as root alone"),
]
Done = subprocess.CompletedProcess[str]


def podman(*arguments: str, check: bool = True, environment: Mapping[str, str] | None = None) -> Done:
    """With runc and cgroupfs, which work also where crun and systemd do not."""
    command = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", *arguments]
    given = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def run(image: str, *command: str, locked: bool = True) -> Done:
    """Without a network, which an import must not need."""
    options = (*LIMITS, *(LOCKED if locked else ()), "--tmpfs", "/tmp", "--network", "none")
    return podman("run", "--rm", *options, image, *command, check=False)
