"""The monitors, rules and dashboards are what the operator, Prometheus and Grafana take."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.observability.queries import DASHBOARDS, OBSERVABILITY, load_dashboard, load_rules

RULES = load_rules()
ALERTS = [rule for rule in RULES if "alert" in rule]
UNITS = {"short", "s", "percent", "percentunit", "watt", "Bps"}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: it is Debian's package promtool"
)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((OBSERVABILITY / name).read_text(encoding="utf-8")))


def overlapping(panels: list[dict[str, Any]]) -> list[tuple[str, str]]:
    def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
        return all(
            one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
            for start, size in (("x", "w"), ("y", "h"))
        )

    return [(a["title"], b["title"]) for a, b in combinations(panels, 2) if overlap(a["gridPos"], b["gridPos"])]


def test_kustomize_is_given_every_file_there_is_to_apply() -> None:
    (kustomization,) = documents("kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    applied = {*kustomization["resources"], *generator["files"]}
    about = {"kustomization.yaml", "metrics.yaml", "rules.test.yaml", "README.md"}
    there = {str(path.relative_to(OBSERVABILITY)) for path in OBSERVABILITY.rglob("*") if path.is_file()}
    assert applied == there - about
    assert generator["options"]["labels"]["grafana_dashboard"] == "1"


def test_all_but_the_network_policy_lies_where_prometheus_is() -> None:
    found = [*documents("monitors.yaml"), *documents("rules.yaml"), *documents("network.yaml")]
    lie = {document["kind"]: document["metadata"]["namespace"] for document in found}
    assert lie.pop("NetworkPolicy") == "fineloop"
    assert (
        set(lie.values())
        == {documents("kustomization.yaml")[0]["configMapGenerator"][0]["namespace"]}
        == {"monitoring"}
    )


def test_prometheus_alone_reaches_the_workflow_controllers_metrics_and_finds_them() -> None:
    (policy,) = documents("network.yaml")
    argo = documents("monitors.yaml")[2]
    assert policy["spec"]["podSelector"] == argo["spec"]["selector"]
    assert policy["metadata"]["namespace"] in argo["spec"]["namespaceSelector"]["matchNames"]
    (rule,) = policy["spec"]["ingress"]
    (peer,) = rule["from"]  # both selectors in one peer: prometheus in monitoring, not either
    assert peer.keys() == {"namespaceSelector", "podSelector"}
    assert rule["ports"] == [{"protocol": "TCP", "port": 9090}]


def test_ray_pods_are_scraped_by_the_label_that_kuberay_gives_them() -> None:
    ray, operator, argo = documents("monitors.yaml")
    assert ray["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert ray["spec"]["namespaceSelector"]["matchNames"] == ["fineloop"]
    assert ray["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    assert "ray.io/cluster" in ray["spec"]["podTargetLabels"]
    # Their series carry a namespace of their own, which must not be replaced by the exporter's.
    assert operator["spec"]["endpoints"][0]["honorLabels"] is True
    assert argo["spec"]["podMetricsEndpoints"][0]["honorLabels"] is True


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_how_bad_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Fineloop[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert re.search(r"fineloop", rule["expr"]), "it would fire for what is not Fineloop's"


def test_names_are_used_once() -> None:
    names = [rule.get("alert") or rule["record"] for rule in RULES]
    assert sorted(set(names)) == sorted(names)
    uids = [load_dashboard(path)["uid"] for path in DASHBOARDS]
    assert [path.stem for path in DASHBOARDS] == uids


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_complete_and_its_panels_do_not_overlap(path: Path) -> None:
    dashboard = load_dashboard(path)
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["tags"] == ["fineloop"]
    assert "id" not in dashboard, "an id belongs to one Grafana"
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    assert overlapping(panels) == []
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_of_a_dashboard_is_defined_and_used(path: Path) -> None:
    dashboard = load_dashboard(path)
    text = json.dumps(dashboard["panels"])
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == {variable["name"] for variable in dashboard["templating"]["list"]}


def test_panels_that_overlap_are_noticed() -> None:
    panels = load_dashboard(DASHBOARDS[0])["panels"]
    panels[1]["gridPos"]["x"] -= 1
    assert overlapping(panels) == [(panels[0]["title"], panels[1]["title"])]


def promtool(tmp_path: Path, *, replace: tuple[str, str] = ("", "")) -> "subprocess.CompletedProcess[str]":
    """Check the rules as Prometheus reads them, then play rules.test.yaml through."""
    text = (OBSERVABILITY / "rules.yaml").read_text(encoding="utf-8")
    assert replace[0] in text
    spec = yaml.safe_load(text.replace(*replace) if replace[0] else text)["spec"]
    groups = tmp_path / "rules.groups.yaml"
    groups.write_text(yaml.safe_dump(spec), encoding="utf-8")
    subprocess.run(["promtool", "check", "rules", "--lint-fatal", groups], check=True, capture_output=True)
    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        rule.pop("annotations", None)  # checked above; the tests name labels alone
    groups.write_text(yaml.safe_dump(spec), encoding="utf-8")
    shutil.copy(OBSERVABILITY / "rules.test.yaml", tmp_path)
    return subprocess.run(
        ["promtool", "test", "rules", tmp_path / "rules.test.yaml"], capture_output=True, text=True, check=False
    )


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    done = promtool(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_played_through_to_its_firing() -> None:
    (tests,) = documents("rules.test.yaml")
    fired = {
        case["alertname"] for test in tests["tests"] for case in test.get("alert_rule_test", []) if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in ALERTS}


@needs_promtool
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (" or vector(0)) == 0", ") == 0"),
        ('unless argo_workflows_total_count{namespace="fineloop",phase="Succeeded"} offset 2d', "unless vector(1)"),
        ('deployment_status=~"Failed|ValidationFailed"', 'deployment_status="Fail"'),
        ('deployment_status="Initializing"', 'deployment_status=~"Initializing|Suspended"'),
        ("for: 20m", "for: 1m"),
        ("> 3600", "> 360"),
        ("fineloop:gpu_utilization:avg < 0.1", "fineloop:gpu_utilization:avg < 10"),
        ('{cluster_queue="fineloop",reason="PodsReadyTimeout"}', '{cluster_queue="fineloop"}'),
        ('kueue_pending_workloads{cluster_queue="fineloop"}', "kueue_pending_workloads"),
        ("== 0\n          for: 10m", "== 1\n          for: 10m"),
        ("> 0.92", "> 0.4"),
        ("> 90", "> 40"),
    ],
)
def test_a_broken_rule_is_noticed(tmp_path: Path, good: str, bad: str) -> None:
    assert promtool(tmp_path, replace=(good, bad)).returncode != 0
