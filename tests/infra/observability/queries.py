"""What infra/observability asks Prometheus: every query of its rules and dashboards, and what each stands on."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

OBSERVABILITY = Path(__file__).resolve().parents[3] / "infra" / "observability"
DASHBOARDS = sorted((OBSERVABILITY / "dashboards").glob("*.json"))
# What stands for Grafana's variables.
_GRAFANA = {"$__rate_interval": "5m", "$cluster": ".*"}


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    where: str
    expr: str


def load_dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def load_rules() -> list[dict[str, Any]]:
    """The rules of every group, in order."""
    resource = yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in resource["spec"]["groups"] for rule in group["rules"]]


def listed_metrics() -> dict[str, list[str]]:
    """The metrics that exist, with the labels that are used of each."""
    found: dict[str, list[str]] = yaml.safe_load((OBSERVABILITY / "metrics.yaml").read_text(encoding="utf-8"))
    return found


def dashboard_queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield Query(f"{dashboard['uid']}: {panel['title']}", filled(target["expr"]))
    for variable in dashboard["templating"]["list"]:
        inner = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"])
        if inner:
            yield Query(f"{dashboard['uid']}: ${variable['name']}", filled(inner[1]))


def rule_queries(rules: list[dict[str, Any]]) -> Iterator[Query]:
    for rule in rules:
        yield Query(rule.get("alert") or rule["record"], rule["expr"])


def filled(expr: str) -> str:
    """The expression with a value for each of Grafana's variables."""
    for name, value in _GRAFANA.items():
        expr = expr.replace(name, value)
    return expr


def unknown(query: Query, metrics: dict[str, list[str]], recorded: dict[str, set[str]]) -> Iterator[str]:
    """Metrics and labels that the query uses and nobody provides.

    Labels are those of selectors, of `by` and of joins; `recorded` holds the labels that each recording rule keeps.
    """
    selected = list(_selectors(promql_parser.parse(query.expr)))
    known: set[str] = set()
    for selector in selected:
        if selector.name in metrics:
            labels = set(metrics[selector.name])
        elif selector.name in recorded:
            labels = recorded[selector.name]
        else:
            yield f"{query.where}: nobody provides {selector.name}"
            continue
        known |= labels
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                yield f"{query.where}: {selector.name} has no label {matcher.name}"
    for label in _grouping(query.expr):
        if label not in known:
            yield f"{query.where}: grouped by {label}, which none of its metrics has"


def recorded_labels(rules: list[dict[str, Any]]) -> dict[str, set[str]]:
    """What each recording rule is called, and the labels that its outermost aggregation keeps."""
    return {rule["record"]: set(_outermost(rule["expr"])) for rule in rules if "record" in rule}


def _outermost(expr: str) -> list[str]:
    grouped = re.match(r"\w+ by \(([^)]*)\)", expr)
    return [label.strip() for label in grouped[1].split(",")] if grouped else []


def _grouping(expr: str) -> set[str]:
    lists = re.findall(r"\b(?:by|on|group_left|group_right|ignoring) ?\(([^)]*)\)", expr)
    return {label.strip() for found in lists for label in found.split(",") if label.strip()}


def _selectors(expression: Any) -> Iterator[Any]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
        return
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(expression, name, None)
        if isinstance(child, promql_parser.Expr) or type(child).__module__ == "promql_parser":
            yield from _selectors(child)
    for child in getattr(expression, "args", None) or ():
        yield from _selectors(child)
