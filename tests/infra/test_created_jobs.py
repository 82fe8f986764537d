"""What `fineloop` creates is held to the same schemas and policies as what people apply."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.ray_cluster.rayjob_manifest import rayjob
from infra.checks import schemas
from infra.checks.check import policies_of, violations
from infra.checks.manifests import Manifest, render_overlay
from infra.checks.pods import pods
from infra.checks.policies.ray import jobs_fit_in_the_queue
from tests.infra.created import CONFIGS, JOB, created
from tests.infra.definitions import DEFINITIONS
from tests.infra.ends import ENDS
from tests.infra.runbook import commands


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
    given = shape(template["spec"]) - shape(created(CONFIGS["gpus"])["spec"])
    assert {path for path in given if not path.endswith(".rayStartParams")} == set()


def test_a_person_is_given_the_disk_of_a_created_job() -> None:
    (template,) = (manifest for manifest in render_overlay("aws") if manifest["kind"] == "RayJob")
    assert disks(template) == disks(created(CONFIGS["gpus"]))


def test_the_runbooks_first_run_fits_the_laptops_queue() -> None:
    (submit,) = {c for c in commands() if c.words[:2] == ("fineloop", "submit") and "-c" in c.words}
    overrides = [value for flag, value in pairwise(submit.words) if flag == "--set"]
    config = config_file.load(Path(submit.words[submit.words.index("-c") + 1]), overrides)
    job = rayjob(config.ray, JOB, 1, namespace="fineloop")
    manifests = [manifest for manifest in render_overlay("kind") if manifest["kind"] != "RayJob"]
    assert list(jobs_fit_in_the_queue([*manifests, job])) == []
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_network_knows_the_pods_of_a_created_job(config: dict[str, Any]) -> None:
    job = created(config)["spec"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert job["submitterPodTemplate"]["metadata"]["labels"].items() >= ENDS["submitter"].labels.items()
    assert "fineloop.dev/autoscaler" not in head  # which would open the Kubernetes API to it


def disks(job: Manifest) -> dict[tuple[str, str], str]:
    """The size of each volume on the node's disk, by container and volume."""
    return {
        (pod.containers[0]["name"], volume["name"]): volume["emptyDir"]["sizeLimit"]
        for pod in pods([job])
        for volume in pod.spec["volumes"]
        if "medium" not in volume["emptyDir"]
    }


def shape(value: Any, where: str = "") -> set[str]:
    """The paths of all fields, the items of a list taken together."""
    if isinstance(value, dict):
        return {path for key, inner in value.items() for path in shape(inner, f"{where}.{key}")} or {where}
    if isinstance(value, list):
        return {path for inner in value for path in shape(inner, f"{where}[]")}
    return {where}
