"""Both images themselves, run as a cluster runs them: what the run of the pipeline in them does not show.

Opt-in, as root: `pytest -m podman`. Needs podman, runc, debootstrap, Debian's mirror and PyPI; no image registry, and
gigabytes for CUDA's wheels.
"""

import pytest

from components.config import config_file
from infra.checks.manifests import ROOT
from tests.infra.images.containers import podman_tier, run

pytestmark = podman_tier

IMPORT_ALL = """
import importlib, pkgutil, sys
for package in map(importlib.import_module, sys.argv[1:]):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print("torch" in sys.modules)
"""
RESOLVE = """
import os, sys, torch
from components.config.schema import ModelConfig
from ray_jobs.base.base_model import resolve
print(torch.version.cuda, torch.cuda.is_available(), *os.listdir(resolve(ModelConfig(base=sys.argv[1])).path))
"""
STEP, TRAIN = ["components", "pipelines"], ["components", "ray_jobs"]
STEPS_LOCKS, TRAINS_LOCKS = ["build.lock", "step.lock"], ["build.lock", "train.lock", "weights.lock"]


@pytest.mark.parametrize(
    ("image", "user", "packages", "locks"),
    [("step_image", "1000 1000", STEP, STEPS_LOCKS), ("train_image", "1000 100", TRAIN, TRAINS_LOCKS)],
)
def test_its_code_is_imported_without_network_and_cannot_be_changed(
    image: str, user: str, packages: list[str], locks: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.getfixturevalue(image)
    done = run(name, "python", "-c", IMPORT_ALL, *packages)
    assert done.stdout.split() == [str(packages == TRAIN)], done.stderr
    assert run(name, "sh", "-c", "echo $(id -u) $(id -g)").stdout.strip() == user
    assert run(name, "sh", "-c", "touch /tmp/written && ! touch /app/components/x && ! touch /x").returncode == 0
    assert "Permission denied" in run(name, "touch", "/app/components/x", locked=False).stderr
    done = run(name, "sh", "-c", "ls -A /app /locks && find /app -name '*.md' -o -name '.git*' -o -name 'test*'")
    assert done.stdout.split() == ["/app:", *packages, "/locks:", *locks]


def test_the_train_image_gives_nobody_root_and_holds_cudas_torch_and_the_examples_base(train_image: str) -> None:
    assert "no new privileges" in run(train_image, "sudo", "-n", "id").stderr  # Ray's base image has it
    base = config_file.load(ROOT / "pipelines/configs/icd10.toml").model.base
    done = run(train_image, "python", "-c", RESOLVE, base)
    cuda, is_available, *files = done.stdout.splitlines()[-1].split()
    assert (cuda, is_available) == ("13.0", "False"), done.stderr  # and fails nowhere without a GPU
    assert "model.safetensors" in files
