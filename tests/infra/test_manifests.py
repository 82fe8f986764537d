"""Every manifest of infra/ renders, and every object in it is what the API server takes, field for field."""

from typing import Any

import pytest
import yaml

from infra.checks import schemas
from infra.checks.manifests import INFRA, OVERLAYS, Loader, overlay_folders, render, render_overlay, title
from pipelines.kubeflow.compile import CONFIG_MAP, ENVIRONMENT
from tests.infra.changes import CONTAINER, REAPER, changed
from tests.infra.created import COMPANY, CONFIGS, created

CRDS = schemas.crds_folder()
OBSERVABILITY = "infra/observability"
TEAM = "infra/overlays/team"
FOLDERS = [*overlay_folders(), TEAM, OBSERVABILITY]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid_to_the_last_field(folder: str) -> None:
    manifests = render(folder)
    assert manifests
    assert {title(m): found for m in manifests if (found := schemas.errors(m, CRDS))} == {}
    if missing := [title(m) for m in manifests if not schemas.is_checked(m, CRDS)]:
        pytest.skip(f"valid but for {', '.join(missing)}, whose definitions are missing: {schemas.HOW}")


@pytest.mark.parametrize("config", [*CONFIGS.values(), COMPANY], ids=[*CONFIGS, "a company's"])
def test_a_job_that_fineloop_creates_is_valid_to_the_last_field(config: dict[str, Any]) -> None:
    assert schemas.errors(created(config), CRDS) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("RayJob spec submitionMode", "HTTPMode"),
        (f"{CONTAINER} imagee", "x"),
        ("RayCluster spec autoscalerOptions version", "v3"),
        ("ClusterQueue spec cohort", "all"),  # v1beta1's name
        (f"{REAPER} spec containers 0 resource", {}),
        ("PodMonitor spec podMetricsEndpoints 0 intervall", "15s"),
        ("PrometheusRule spec groups 0 rules 0 exp", "1"),
        ("RayJob kind", "RayJobs"),
        ("RayJob apiVersion", "ray.io/v2"),
        ("LimitRange kind", "LimitRanges"),
    ],
)
def test_a_wrong_field_or_kind_is_found(where: str, value: object) -> None:
    plain, broken = (render_overlay("aws") + render(OBSERVABILITY) for _ in range(2))
    changed(broken, where, value)
    (manifest,) = (found for found in broken if found not in plain)
    if not schemas.is_checked(manifest, CRDS):
        pytest.skip(f"no definition of {title(manifest)}: {schemas.HOW}")
    assert schemas.errors(manifest, CRDS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_that_are_to_go_have_as_long_as_those_that_fineloop_creates(overlay: str) -> None:
    def ends(manifest: dict[str, Any]) -> list[tuple[Any, ...]]:
        cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        pods = [group["template"]["spec"] for group in groups]
        env = [{each["name"]: each.get("value") for each in pod["containers"][0]["env"]} for pod in pods]
        drains = [each["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] for each in env]
        keys = ("terminationGracePeriodSeconds", "shareProcessNamespace")
        return [(*(pod.get(key) for key in keys), drain) for pod, drain in zip(pods, drains, strict=True)]

    wanted = ends(created(next(iter(CONFIGS.values()))))
    clusters = [each for each in render_overlay(overlay) if each["kind"] in ("RayJob", "RayCluster")]
    assert all(ends(each) == wanted for each in clusters)


def test_an_overlay_that_does_not_render_says_why() -> None:
    with pytest.raises(ValueError, match="infra/none"):
        render("infra/none")


def test_every_manifest_is_named_by_the_kustomization_beside_it() -> None:
    """What nobody applies is not checked either."""
    apart = {"helm-values.yaml", "kind-config.yaml", "metrics.yaml", "rules.test.yaml"}
    for file in INFRA.glob("*/**/*.yaml"):
        if file.name not in apart | {"kustomization.yaml"}:
            named = file.with_name("kustomization.yaml").read_text(encoding="utf-8")
            assert f"- {file.name}\n" in named or f"- path: {file.name}\n" in named, file


def test_kueue_is_installed_so_that_no_job_goes_round_its_queue() -> None:
    values = yaml.load((INFRA / "kueue/helm-values.yaml").read_text(encoding="utf-8"), Loader=Loader)
    config = yaml.load(values["managerConfig"]["controllerManagerConfigYaml"], Loader=Loader)
    assert config["apiVersion"] == "config.kueue.x-k8s.io/v1beta2"
    assert config["manageJobsWithoutQueueName"] is True
    (namespace,) = render("infra/namespace")[:1]
    assert config["managedJobsNamespaceSelector"]["matchLabels"].items() <= namespace["metadata"]["labels"].items()
    assert config["integrations"]["frameworks"] == ["ray.io/rayjob"]
    assert config["waitForPodsReady"].keys() >= {"timeout", "recoveryTimeout", "requeuingStrategy"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_find_the_store_and_report_to_nobody(overlay: str) -> None:
    """Ray pods take the whole ConfigMap; a step names each key. boto3 reads AWS_DEFAULT_REGION, and no AWS_REGION."""
    (environment,) = (m["data"] for m in render_overlay(overlay) if m["metadata"]["name"] == CONFIG_MAP)
    assert {name for name in environment if name.startswith("AWS_")} <= {*ENVIRONMENT}
    assert "AWS_DEFAULT_REGION" in environment
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_second_team_has_everything_of_its_own_and_a_queue_that_lends() -> None:
    """It changes nothing of the first team's: what both apply under one name is the same."""
    first, second = ({key(m): m for m in render(folder)} for folder in ("infra/overlays/kind", TEAM))
    assert {key for key in first if key in second and first[key] != second[key]} == set()
    own = {kind for kind, _, namespace in second.keys() - first.keys() if namespace == "fineloop-team"}
    assert own >= {"ServiceAccount", "Role", "NetworkPolicy", "ResourceQuota", "LocalQueue", "ConfigMap", "CronJob"}
    (queue,) = (m for (kind, _, _), m in second.items() if kind == "ClusterQueue")
    (local,) = (m for (kind, _, _), m in second.items() if kind == "LocalQueue")
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"] == "fineloop-team"
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "fineloop-team"}
    assert queue["spec"]["cohortName"]
    assert "namespace: fineloop\n" not in yaml.safe_dump_all(second.values())


def key(manifest: Any) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace", "")
