"""Renders a run's files as one self-contained HTML page: no font, no request, and no script but the one that searches
its own tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from components.report import charts, comparison, run_files, sections
from components.report.charts import loss_curve
from components.report.comparison import harness, past_decisions, slices, suites
from components.report.html import clipped, count, moment, sure_once, template
from components.report.run_files import RunFiles
from components.report.sections import EXPLAINED, headline, next_steps
from components.shared.durations import counted, duration
from components.shared.metrics import metric_of, metrics_of
from components.shared.paired import Bounds


def build_report(run: RunFiles, *, pages_at: str = "") -> str:
    """Render the whole page. Every text that comes from data or from a model is escaped.

    `pages_at` is the path from this page to the registry's pages; if it is empty, none is linked.
    """
    shown = sections.samples(run)
    wrong, rest = sections.wrong_answers(run)
    champion, top, rules = run.model("champion"), headline(run), comparison.rules(run)
    sentences = sure_once("\0".join([*top.reasons, *(row.rule.text for row in rules)])).split("\0")
    return template("report.html").render(
        run=run,
        pages_at=pages_at,
        explained=EXPLAINED,
        forgotten=sections.forgotten(run),
        headline=top,
        reasons=sentences[: len(top.reasons)],
        rule_texts=sentences[len(top.reasons) :],
        facts=sections.run_facts(run),
        costs=sections.costs(run),
        names=comparison.names(run),
        champion=champion.version or "a version without a name" if champion is not None else None,
        num_evaluated=count(run.evaluation.records) if run.evaluation else None,
        panels=comparison.panels(run),
        table=comparison.table(run),
        intervals=comparison.intervals(run),
        slices=slices(run),
        suites=suites(run),
        harness=harness(run),
        past_decisions=past_decisions(run),
        rules=rules,
        samples=shown,
        next_steps=next_steps(run),
        classes=run_files.by_class(run.evaluation.confusion if run.evaluation else None),
        matrix=run_files.matrix(run.evaluation.confusion if run.evaluation else None),
        wrong=wrong,
        rest=rest,
        counted=counted,
        right_counts=sections.right_counts(shown),
        curve=loss_curve(run.metrics),
        rates=Markup(charts.rates_picture(run.sweep)) if run.sweep else None,
        data=sections.data_profile(run.profile, run.replayed),
        steps=sections.step_times(run),
        total_time=duration(sum(step.seconds for step in run.steps)),
        origin=sections.origin(run),
        generated_at=moment(run.generated_at),
    )


def build_preview(body: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Render a preview of what a run would make of its data: the output of `ray_jobs.preview`, and its meaning."""
    return template("preview.html").render(
        title=", ".join(each["source"] for each in body["profile"]["sources"]),
        lines=lines,
        problem=body["refused"] or body["gate"]["lacking"],
        data=sections.data_profile(body["profile"]),
        base=body["base"],
        shown=body["shown"],
        unread_because=body["unread_because"],
    )


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


def build_side_by_side(
    columns: Sequence[Column],
    differing: Mapping[str, Sequence[str]],
    beside: Sequence[Beside],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    generated_at: datetime,
) -> str:
    """Render several runs side by side; `records` are those of each run's metrics.jsonl, by the run's name."""
    drawn = charts.curves_picture(records)
    return template("side_by_side.html").render(
        title=" and ".join(f"“{each.note}”" if each.note else each.name for each in columns),
        columns=columns,
        metrics=metric_rows([each.metrics for each in columns]),
        differing=differing,
        beside=[(each, *_beside(each)) for each in beside],
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


def _beside(beside: Beside) -> tuple[list[charts.Interval], str]:
    intervals = [
        comparison.interval(
            metric_of(key).title,
            gain_text(key, bounds, beside.confidence),
            metric_of(key),
            bounds.gain,
            (bounds.lower, bounds.upper),
        )
        for key, bounds in beside.gains.items()
        if math.isfinite(bounds.lower) and math.isfinite(bounds.upper)
    ]
    right = sum(each.is_right for each in beside.turned)
    wrong = len(beside.turned) - right
    return intervals, f"{count(right)} records turned right and {count(wrong)} wrong, of {count(beside.records)}"
