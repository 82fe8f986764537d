"""The three models side by side: bars with the gate's bounds, the paired intervals, and the table of differences."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from components.records.steps import ROLES, HarnessScores, Role, RuleResult, score_text
from components.report.charts import Bar, Forest, Gain, axis_of, bar
from components.report.html import clipped, count
from components.report.run_files import RunFiles
from components.shared.metrics import RELATIVE, Metric, is_metric, metric_of, metrics_of


class Mark(NamedTuple):
    """A bound that the gate sets: the position of a line over the bars, and its meaning."""

    position: float
    text: str
    passed: bool


class Panel(NamedTuple):
    """One metric's bars."""

    metric: Metric
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]

    @property
    def text(self) -> str:
        """The panel in words, for readers who cannot see it."""
        return f"{self.metric.title}: " + "; ".join(f"{bar.name} {bar.text}" for bar in self.bars)


@dataclass(frozen=True)
class ModelRow:
    """A line of a table that has a column for each model."""

    title: str
    about: str
    values: Mapping[Role, str]
    gains: Mapping[Role, tuple[str, str]] = field(default_factory=dict)
    """For each other model: the difference in words, and one of better, worse, same."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further columns before the models', by their titles."""


def amounts_of(rule: RuleResult) -> Metric:
    """The metric whose format a rule's gain and bounds have."""
    return RELATIVE if rule.relative else metric_of(rule.metric or "")


def names(run: RunFiles) -> dict[Role, str]:
    """The names of the roles on the page; the champion has the name of its alias."""
    return {"base": "Base model", "champion": run.alias.capitalize(), "candidate": "Candidate"}


def panels(run: RunFiles) -> list[Panel]:
    """One panel for each metric that was measured."""
    called = names(run)
    result = []
    for metric in metrics_of(_measured(run)):
        values = {role: value for role in ROLES if (value := run.metric(role, metric.key)) is not None}
        bounds = [
            (rule.line, rule.line_text, rule.passed)
            for rule in run.rules
            if rule.metric == metric.key and rule.line is not None
        ]
        if not values or (metric.repeats and not bounds):  # without its own bound it would show the same picture twice
            continue
        axis = axis_of([0.0, *values.values(), *(bound for bound, _, _ in bounds)])
        bars = tuple(
            bar(axis, min(value, 0.0), max(value, 0.0), kind=role, name=called[role], text=metric.text(value))
            for role, value in values.items()
        )
        marks = tuple(Mark(axis.place(bound), text, passed) for bound, text, passed in bounds)
        result.append(Panel(metric, bars, marks))
    return result


def intervals(run: RunFiles) -> list[Forest]:
    """The gain between its bounds for each comparison of the gate; without a gate, for each of the evaluation."""
    return [*_of_rules(run)] or [*_of_evaluation(run)]


def _of_rules(run: RunFiles) -> Iterator[Forest]:
    for rule in run.rules:
        if not (rule.against and is_metric(rule.metric)) or None in (rule.gain, rule.lower, rule.upper):
            continue
        metric, amounts = metric_of(rule.metric), amounts_of(rule)
        bound = None if rule.line is None or rule.other is None else metric.gain(rule.line, rule.other)
        if bound is not None and rule.relative:
            bound /= abs(rule.other or 1.0)
        text = f"{metric.title}: {amounts.gain_text(rule.gain or 0.0)}, {amounts.range_text(rule.lower, rule.upper)}"
        yield interval(Gain(rule.title, "", rule.gain or 0.0, rule.lower, rule.upper, text), amounts, bound)


def _of_evaluation(run: RunFiles) -> Iterator[Forest]:
    for role, called in (("base", "base model"), ("champion", run.alias)):
        paired = run.evaluation.paired.get(role) if run.evaluation else None
        if paired is None or paired.ci95 is None or not is_metric(paired.metric):
            continue
        metric, (low, high) = metric_of(paired.metric), paired.ci95
        ends = f"95 % interval {metric.signed_text(low)} to {metric.signed_text(high)}"
        text = f"{metric.title}: {metric.gain_text(paired.difference)}, {ends}, {count(paired.records)} records"
        yield interval(Gain(f"Candidate against {called}", "", paired.difference, low, high, text), metric)


def interval(gain: Gain, amounts: Metric, bound: float | None = None) -> Forest:
    """One gain on an axis of its own, with the bound that it should reach, if any."""
    return Forest([gain], bound, "" if bound is None else f"required: {amounts.signed_text(bound)} or more")


def table(run: RunFiles) -> list[ModelRow]:
    """All metrics of the three models, with the candidate's differences."""
    rows = []
    broken = {rule.metric for rule in run.rules if not rule.passed}
    for metric in metrics_of(_measured(run)):
        values = {role: value for role in ROLES if (value := run.metric(role, metric.key)) is not None}
        gains: dict[Role, tuple[str, str]] = {}
        for role in values.keys() - {"candidate"} if "candidate" in values else ():
            words = metric.gain_text(metric.gain(values["candidate"], values[role]))
            # Every training changes metrics outside the domain: a change is bad only if a rule says so.
            shown_as = ("better", "worse") if not metric.probe or metric.key in broken else ()
            gains[role] = (words, next((way for way in shown_as if words.endswith(way)), "same"))
        if values:
            shown = {role: metric.text(value) for role, value in values.items()}
            rows.append(ModelRow(metric.title, metric.unit, shown, gains))
    return rows


def rules(run: RunFiles) -> list[tuple[RuleResult, str, str]]:
    """The gate's rules with the candidate's number and the other one: first the failed ones, then those undecided or
    waiting for a person, then those passed."""
    order = ["failed", "cannot tell", "needs approval", "passed"]
    rows = []
    for rule in sorted(run.rules, key=lambda rule: order.index(rule.short)):
        metric = metric_of(rule.metric) if is_metric(rule.metric) else None
        ours, theirs = (
            metric.text(value) if metric and value is not None else "" for value in (rule.candidate, rule.other)
        )
        rows.append((rule, ours, theirs))
    return rows


def _measured(run: RunFiles) -> set[str]:
    return {key for role in ROLES if (model := run.model(role)) for key in model.metrics}


def harness(scores: HarnessScores) -> list[ModelRow]:
    """The results of the tasks of lm-evaluation-harness, with their standard errors."""
    return [
        ModelRow(
            task, "", {role: score_text(scores.score(role, task, metric)) for role in ROLES}, more={"Metric": metric}
        )
        for task, metric in scores.rows
    ]


def since_champion(run: RunFiles) -> list[Forest]:
    """Candidate against champion on the records that are new since the champion's run, and on those that it had read:
    one picture a metric."""
    gains: dict[str, list[Gain]] = {}
    for which, paired in (run.evaluation.since_champion if run.evaluation else {}).items():
        for pair in paired:
            if pair.ci95 is not None and is_metric(pair.metric):
                metric, name = metric_of(pair.metric), f"{'new since' if which == 'new' else 'known to'} {run.alias}"
                text = f"{metric.signed_text(pair.difference)} ({metric.range_text(*pair.ci95)})"
                gain = Gain(name, f"{count(pair.records)} records", pair.difference, *pair.ci95, text)
                gains.setdefault(metric.title, []).append(gain)
    note = "candidate against champion, each with its 95 % interval. Solid: no difference."
    return [Forest(of_metric, None, f"{title}, {note}") for title, of_metric in gains.items()]


def slices(run: RunFiles) -> Forest | None:
    """The findings of the gate's rule on slices, worst first; None if it had no slice to judge."""
    rule = next((rule for rule in run.rules if rule.slices), None)
    if rule is None:
        return None
    amounts, bound = amounts_of(rule), -(rule.bound or 0.0)
    gains = [
        Gain(
            f"{result.kind}: {clipped(result.name)}",
            f"{count(result.records)} records",
            result.gain,
            result.lower,
            result.upper,
            f"{amounts.signed_text(result.gain)} ({amounts.range_text(result.lower, result.upper)})",
            bad=result.worse,
        )
        for result in rule.slices
    ]
    note = (
        f"{metric_of(rule.metric or '').title}, candidate against champion on each kind of record, each bound with "
        f"{(rule.confidence or 0) * 100:.4g} % confidence, so that all of them hold together. Solid: no difference. "
        f"Dashed: {amounts.signed_text(bound)}, below which a slice must not be shown to lie."
    )
    return Forest(gains, bound, note)
