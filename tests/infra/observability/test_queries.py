"""No rule and no panel asks for what does not exist."""

import json
import subprocess
import sys
from itertools import chain
from typing import Any

import promql_parser
import pytest

from tests.infra.observability.queries import (
    DASHBOARDS,
    Query,
    dashboard_queries,
    listed_metrics,
    load_dashboard,
    load_rules,
    recorded_labels,
    rule_queries,
    unknown,
)

RULES = load_rules()
METRICS = listed_metrics()
RECORDED = recorded_labels(RULES)
QUERIES = [*rule_queries(RULES), *chain.from_iterable(dashboard_queries(load_dashboard(path)) for path in DASHBOARDS)]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_parses_and_asks_for_metrics_and_labels_that_exist(query: Query) -> None:
    promql_parser.parse(query.expr)
    assert list(unknown(query, METRICS, RECORDED)) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("ray_node_gpu_utilization", "nobody provides ray_node_gpu_utilization"),
        ('kueue_pending_workloads{queue="fineloop"}', "kueue_pending_workloads has no label queue"),
        ("sum by (cluster) (kueue_pending_workloads)", "grouped by cluster"),
        ('increase(argo_workflows_total_count{status="Failed"}[1h])', "has no label status"),
        ('1 - fineloop:gpu_utilization:avg{pod="x"}', "fineloop:gpu_utilization:avg has no label pod"),
        ("fineloop:gpu_utilisation:avg > 0", "nobody provides fineloop:gpu_utilisation:avg"),
        ("(vector(0) or nothing) unless other offset 1h", "nobody provides other"),
    ],
)
def test_a_query_for_what_does_not_exist_is_noticed(expr: str, fault: str) -> None:
    assert any(fault in found for found in unknown(Query("here", expr), METRICS, RECORDED))


def test_every_listed_metric_and_every_recorded_one_is_used() -> None:
    text = "\n".join(query.expr for query in QUERIES)
    assert [name for name in (*METRICS, *RECORDED) if name not in text] == []


RAYS = """
import json
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.data._internal.usage import collector
from ray.train.v2._internal.metrics.controller import ControllerMetrics
print(json.dumps({
    "node": {name: sorted(gauge.view.columns) for name, gauge in METRICS_GAUGES.items()},
    "train": [ControllerMetrics.CONTROLLER_STATE, ControllerMetrics.WORKER_GROUP_START_TOTAL_TIME_S],
    "memory": collector._OOM_KILL_METRIC,
}))
"""


@pytest.fixture(scope="module")
def rays() -> dict[str, Any]:
    """What the installed Ray has. Asked elsewhere: importing it settles how this process authenticates for good."""
    asked = subprocess.run([sys.executable, "-W", "ignore", "-c", RAYS], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return found


def test_rays_metrics_are_those_of_the_ray_that_is_installed(rays: dict[str, Any]) -> None:
    ours = {name.removeprefix("ray_") for name in METRICS if name.startswith("ray_node_")}
    assert ours - rays["node"].keys() == set()
    train = {name.removeprefix("ray_") for name in METRICS if name.startswith("ray_train_")}
    assert train <= set(rays["train"])
    assert {name for name in METRICS if name.startswith("ray_memory")} == {rays["memory"]}
    assert {name[:9] for name in METRICS if name.startswith("ray_")} == {"ray_node_", "ray_train", "ray_memor"}


def test_the_labels_of_rays_metrics_are_those_that_ray_gives_them(rays: dict[str, Any]) -> None:
    from_monitor = {"namespace", "pod", "ray_io_cluster"}
    for name, labels in METRICS.items():
        columns = rays["node"].get(name.removeprefix("ray_"))
        if columns is not None:
            assert set(labels) - from_monitor <= set(columns), name
