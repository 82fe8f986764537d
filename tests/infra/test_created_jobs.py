"""What `fineloop` creates is held to the same schemas and policies as what people apply."""

from pathlib import Path
from typing import Any

import pytest

from tests.infra import schemas
from tests.infra.check import policies_of, violations
from tests.infra.manifests import Manifest, render_overlay
from tests.infra.test_manifests import DEFINITIONS

pytest.importorskip("components.shared.rayjob_manifest")

from components.shared.ray_backend import Job
from components.shared.ray_config import RayConfig
from components.shared.rayjob_manifest import rayjob

IMAGE = f"registry.example/fineloop/train@sha256:{'1' * 64}"
JOB = Job(run_id="night-7", task="finetune", command=("python", "-m", "ray_jobs.finetune"), timeout_s=3600)
CONFIGS = {
    "gpus": {"num_workers": 2, "use_gpu": True, "gpu": "A10G"},
    "cpus": {"num_workers": 2},
    "spot": {"num_workers": 4, "use_gpu": True, "cluster": {"nodes": 2, "spot": True}},
}


def created(config: dict[str, Any]) -> Manifest:
    cluster = {"kind": "rayjob", "image": IMAGE, "priority_class": "fineloop-scheduled", **config.get("cluster", {})}
    ray = RayConfig.model_validate(config | {"cluster": cluster})
    return rayjob(ray, JOB, 1, namespace="fineloop")


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_created_job_is_valid_to_the_last_field(config: dict[str, Any], crds: Path | None) -> None:
    assert schemas.errors(created(config), crds) == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_created_job_keeps_every_policy(config: dict[str, Any]) -> None:
    manifests = [manifest for manifest in render_overlay("aws") if manifest["kind"] != "RayJob"]
    assert list(violations([*manifests, created(config)], policies_of("aws"))) == []


def test_a_person_is_given_the_shape_of_a_created_job() -> None:
    """What is learnt on one holds for the other."""
    (template,) = (manifest for manifest in render_overlay("aws") if manifest["kind"] == "RayJob")
    ours = {".rayClusterSpec.workerGroupSpecs[].rayStartParams"}  # empty: KubeRay demands it, where nothing is set
    assert shape(template["spec"]) - shape(created(CONFIGS["gpus"])["spec"]) <= ours


def shape(value: Any, where: str = "") -> set[str]:
    """The paths of all fields, the items of a list taken together."""
    if isinstance(value, dict):
        return {path for key, inner in value.items() for path in shape(inner, f"{where}.{key}")} or {where}
    if isinstance(value, list):
        return {path for inner in value for path in shape(inner, f"{where}[]")}
    return {where}
