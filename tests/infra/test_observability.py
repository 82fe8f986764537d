"""What watches Fineloop asks for what exists, and fires when it should."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from infra.checks.manifests import INFRA, Manifest, of_kind, render

FOLDER = INFRA / "observability"
MANIFESTS = render("infra/observability")
SPEC = next(of_kind(MANIFESTS, "PrometheusRule"))["spec"]
RULES = [rule for group in SPEC["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
BOARDS = {name: json.loads(text) for name, text in next(of_kind(MANIFESTS, "ConfigMap"))["data"].items()}
METRICS: dict[str, list[str]] = yaml.safe_load((FOLDER / "metrics.yaml").read_text(encoding="utf-8"))


def queries() -> Iterator[tuple[str, str]]:
    """Every expression and where it stands, with a value for each of Grafana's variables."""
    yield from ((rule.get("alert") or rule["record"], rule["expr"]) for rule in RULES)
    for name, board in BOARDS.items():
        texts = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        texts += [found[1] for each in board["templating"]["list"] if (found := re.search(r"\((.*),", each["query"]))]
        yield from ((name, text.replace("$__rate_interval", "5m")) for text in texts)


def selectors(expression: Any) -> Iterator[Any]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
        return
    children = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    for child in [*children, *(getattr(expression, "args", None) or ())]:
        if type(child).__module__ == "promql_parser" or isinstance(child, promql_parser.Expr):
            yield from selectors(child)


def labels_of(metric: str) -> set[str]:
    """Labels that a recording rule's outermost aggregation keeps."""
    kept = re.match(r"\w+ by \(([^)]*)\)", RECORDED.get(metric, ""))
    return {*METRICS.get(metric, []), *(kept[1].replace(" ", "").split(",") if kept else [])}


@pytest.mark.parametrize(("where", "expr"), list(queries()))
def test_a_query_asks_for_metrics_and_labels_that_exist(where: str, expr: str) -> None:
    found = list(selectors(promql_parser.parse(expr)))
    assert {selector.name for selector in found} <= METRICS.keys() | RECORDED.keys()
    for selector in found:
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels_of(selector.name)
    grouping = re.findall(r"\b(?:by|on|group_left|group_right|ignoring) ?\(([^)]*)\)", expr)
    assert {*", ".join(grouping).split(", ")} <= {"", *(label for each in found for label in labels_of(each.name))}


def test_a_count_of_runs_that_ended_sees_the_first_one() -> None:
    """Argo's counter appears at 1, in which increase() by itself sees nothing."""
    counts = [expr for _, expr in queries() if "increase(argo_workflows_total_count" in expr]
    assert len(counts) == 4
    assert [expr for expr in counts if "unless argo_workflows_total_count" not in " ".join(expr.split())] == []


RAYS = """
import json
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.data._internal.usage import collector
from ray.train.v2._internal.metrics.controller import ControllerMetrics
others = [ControllerMetrics.CONTROLLER_STATE, ControllerMetrics.WORKER_GROUP_START_TOTAL_TIME_S]
others.append(collector._OOM_KILL_METRIC)
gauges = {f"ray_{name}": sorted(gauge.view.columns) for name, gauge in METRICS_GAUGES.items()}
print(json.dumps(gauges | {"ray_" + name.removeprefix("ray_"): None for name in others}))
"""


def test_rays_metrics_and_labels_are_those_of_the_ray_that_is_installed() -> None:
    """Asked in another process: importing it settles how this one authenticates for good."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RAYS], capture_output=True, text=True, check=True)
    rays: dict[str, list[str] | None] = json.loads(done.stdout.splitlines()[-1])
    ours = {name: labels for name, labels in METRICS.items() if name.startswith("ray_")}
    assert ours.keys() - rays.keys() == set()
    from_monitor = {"namespace", "pod", "ray_io_cluster"}
    assert [name for name, labels in ours.items() if set(labels) - from_monitor - set(rays[name] or labels)] == []


def test_monitors_select_what_is_there_and_every_dashboard_is_loaded() -> None:
    monitors = {each["metadata"]["name"]: each["spec"] for each in of_kind(MANIFESTS, "PodMonitor", "ServiceMonitor")}
    ray, argo = monitors["fineloop-ray"], monitors["fineloop-workflow-controller"]
    # KubeRay's label of each of its pods, and its name of their port.
    assert ray["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert ray["podMetricsEndpoints"][0]["port"] == "metrics"
    # Argo's series carry a namespace of their own, which must not be replaced by the exporter's.
    assert argo["podMetricsEndpoints"][0]["honorLabels"] is True
    assert argo["selector"] == next(of_kind(MANIFESTS, "NetworkPolicy"))["spec"]["podSelector"]
    assert BOARDS.keys() == {path.name for path in (FOLDER / "dashboards").iterdir()}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do_and_fires_in_a_test(rule: Manifest) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert "fineloop" in rule["expr"], "it would fire for what is not Fineloop's"
    played = yaml.safe_load((FOLDER / "rules.test.yaml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in played for case in test.get("alert_rule_test", [])]
    assert any(case["alertname"] == rule["alert"] and case["exp_alerts"] for case in cases)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: Debian's package promtool")
def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    """By promtool, which checks the rules and then plays rules.test.yaml through; that names labels alone."""
    groups = tmp_path / "rules.groups.yaml"
    groups.write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    subprocess.run(["promtool", "check", "rules", "--lint-fatal", groups], check=True, capture_output=True)
    bare = [{**group, "rules": [{**rule, "annotations": {}} for rule in group["rules"]]} for group in SPEC["groups"]]
    groups.write_text(yaml.safe_dump({"groups": bare}), encoding="utf-8")
    played = shutil.copy(FOLDER / "rules.test.yaml", tmp_path)
    done = subprocess.run(["promtool", "test", "rules", played], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
