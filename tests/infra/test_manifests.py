"""Every manifest of infra/ renders, and every object in it is what the API server takes, field for field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.checks import schemas
from infra.checks.manifests import INFRA, OVERLAYS, Loader, Manifest, overlay_folders, render, render_overlay, title
from pipelines.kubeflow.task_settings import CONFIG_MAP, ENVIRONMENT
from tests.infra.definitions import CRDS, DEFINITIONS

PROFILED = "kubeflow/profile/kustomization.yaml"
"""Applied by who takes a line of an overlay in: see `test_profile.py`."""
FIELDS_TO_BREAK = [
    ("RayJob", ("spec", "submitionMode"), "HTTPMode"),
    ("RayJob", ("spec", "backoffLimit"), "1"),
    ("RayJob", ("spec", "rayClusterSpec", "rayVersoin"), "2.60.0"),
    ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "serviceAcountName"), "x"),
    ("RayJob", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "imagee"), "x"),
    ("RayJob", ("spec", "rayClusterSpec", "authOptions", "mode"), "none"),
    ("RayCluster", ("spec", "autoscalerOptions", "version"), "v3"),
    ("RayCluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ("ClusterQueue", ("spec", "cohort"), "all"),  # v1beta1's name
    ("ClusterQueue", ("spec", "queueingStrategy"), "Fifo"),
    ("LocalQueue", ("spec", "clusterQueue"), None),
    ("ResourceFlavor", ("spec", "nodeLabels"), {"a": 1}),
    ("WorkloadPriorityClass", ("value",), "high"),
    ("NetworkPolicy", ("spec", "policyType"), ["Egress"]),
    ("CronJob", ("spec", "jobTemplate", "spec", "template", "spec", "containers", 0, "resource"), {}),
    ("ResourceQuota", ("spec", "hart"), {}),
    ("Role", ("rules", 0, "verb"), ["get"]),
]


def find(kind: str) -> Manifest:
    return next(m for folder in overlay_folders() for m in render(folder) if m["kind"] == kind)


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize("folder", overlay_folders())
def test_every_object_is_valid_to_the_last_field(folder: str, crds: Path | None) -> None:
    manifests = render(folder)
    assert manifests
    assert {title(m): found for m in manifests if (found := schemas.errors(m, crds))} == {}


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize(("kind", "path", "value"), FIELDS_TO_BREAK)
def test_a_wrong_field_is_found(kind: str, path: tuple[str | int, ...], value: object, crds: Path | None) -> None:
    manifest = find(kind)
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert schemas.errors(manifest, crds)


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("v1", "Pood"),
        ("ray.io/v1", "RayJobs"),
        ("ray.io/v2", "RayJob"),
        ("kueue.x-k8s.io/v1beta2", "Queue"),
        ("example.org/v1", "Thing"),
    ],
)
def test_an_unknown_kind_is_an_error(api_version: str, kind: str, crds: Path | None) -> None:
    found = schemas.errors({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}, crds)
    assert [error for error in found if error.startswith("kind: ")] == found != []


@pytest.mark.skipif(CRDS is None, reason=f"{schemas.VARIABLE} is not set: `make crds` says how")
def test_our_own_schemas_know_no_field_that_the_definitions_do_not() -> None:
    assert CRDS is not None
    assert list(schemas.own_fields_that_are_unknown(CRDS)) == []


def test_an_overlay_that_does_not_render_says_why() -> None:
    with pytest.raises(ValueError, match="infra/none"):
        render("infra/none")


def test_every_folder_of_infra_is_part_of_an_overlay() -> None:
    """A manifest that nobody applies is not checked either."""
    used: set[Path] = set()
    pending = [INFRA.parent / folder for folder in overlay_folders()]
    while pending:
        folder = pending.pop()
        used.add(folder / "kustomization.yaml")
        kustomization = yaml.load((folder / "kustomization.yaml").read_text(encoding="utf-8"), Loader=Loader)
        for entry in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
            path = (folder / entry).resolve()
            if path.is_dir():
                pending.append(path)
            else:
                used.add(path)
    apart = {INFRA / name for name in ("kueue/helm-values.yaml", "kubeflow/artifact-store.yaml", PROFILED)}
    apart.add(INFRA / "overlays/kind/kind-config.yaml")
    ours = ("namespace", "rbac", "network", "kueue", "kubeflow", "kuberay", "overlays")
    assert {path for name in ours for path in (INFRA / name).rglob("*.yaml")} == used | apart


def test_kueue_is_installed_so_that_no_job_goes_round_its_queue() -> None:
    values = yaml.load((INFRA / "kueue/helm-values.yaml").read_text(encoding="utf-8"), Loader=Loader)
    config = yaml.load(values["managerConfig"]["controllerManagerConfigYaml"], Loader=Loader)
    assert config["apiVersion"] == "config.kueue.x-k8s.io/v1beta2"
    assert config["manageJobsWithoutQueueName"] is True
    assert config["managedJobsNamespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "fineloop"}}
    assert config["integrations"]["frameworks"] == ["ray.io/rayjob"]
    assert config["waitForPodsReady"].keys() >= {"timeout", "recoveryTimeout", "requeuingStrategy"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_steps_are_told_where_the_store_is_as_ray_pods_are(overlay: str) -> None:
    """Ray pods take the whole ConfigMap; a step names each key. boto3 reads AWS_DEFAULT_REGION, and no AWS_REGION."""
    (environment,) = (m["data"] for m in render_overlay(overlay) if m["metadata"]["name"] == CONFIG_MAP)
    assert {name for name in environment if name.startswith("AWS_")} <= {*ENVIRONMENT}
    assert "AWS_DEFAULT_REGION" in environment


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_sends_no_reports_of_its_use_to_its_makers(overlay: str) -> None:
    """It does unless it is told not to, and egress to port 443 lets it; local runs are told in `ray_head`."""
    (environment,) = (m["data"] for m in render_overlay(overlay) if m["metadata"]["name"] == CONFIG_MAP)
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
