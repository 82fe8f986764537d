"""Renders several runs side by side as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from components.report import comparison, curves
from components.report.html import clipped, count, moment, template
from components.shared.metrics import metric_of, metrics_of
from components.shared.paired import Bounds


@dataclass(frozen=True)
class Column:
    """One run."""

    name: str
    run_id: str
    version: str
    note: str
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Beside:
    """The comparison of a run with the first one."""

    name: str
    records: int
    confidence: float
    gains: Mapping[str, Bounds]
    turned: Sequence[Any]
    """The records that turned right or wrong, each with id, prompt, reference, before, after and is_right."""


def build_page(
    columns: Sequence[Column],
    differing: Mapping[str, Sequence[str]],
    beside: Sequence[Beside],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    generated_at: datetime,
) -> str:
    """Render the page; `records` are those of each run's metrics.jsonl, by the run's name."""
    drawn = curves.picture(records)
    return template("side_by_side.html").render(
        title=" and ".join(f"“{each.note}”" if each.note else each.name for each in columns),
        columns=columns,
        metrics=metric_rows([each.metrics for each in columns]),
        differing=differing,
        beside=[(each, _intervals(columns[0].name, each), _counts(each)) for each in beside],
        curves=Markup(drawn) if drawn else None,
        clipped=clipped,
        generated_at=moment(generated_at),
    )


def metric_rows(of_each: Sequence[Mapping[str, float | None]]) -> list[tuple[str, list[str]]]:
    """The rows of metrics: the name, and the value in every run, or a dash if it was not measured."""
    rows = []
    for metric in metrics_of({key for metrics in of_each for key in metrics}):
        values = [metrics.get(metric.key) for metrics in of_each]
        if any(value is not None for value in values):
            rows.append((metric.label, ["-" if value is None else metric.text(value) for value in values]))
    return rows


def gain_text(key: str, found: Bounds, confidence: float) -> str:
    """A gain with its bounds, in words."""
    metric = metric_of(key)
    return f"{metric.gain_text(found.gain)}, {metric.range_text(found.lower, found.upper, confidence=confidence)}"


def _intervals(first: str, beside: Beside) -> list[comparison.Interval]:
    return [
        comparison.interval(
            metric_of(key).title,
            gain_text(key, found, beside.confidence),
            metric_of(key),
            found.gain,
            (found.lower, found.upper),
        )
        for key, found in beside.gains.items()
        if math.isfinite(found.lower) and math.isfinite(found.upper)
    ]


def _counts(beside: Beside) -> str:
    right = sum(each.is_right for each in beside.turned)
    return (
        f"{count(right)} records turned right and {count(len(beside.turned) - right)} wrong, of {count(beside.records)}"
    )
