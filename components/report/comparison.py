"""The three models side by side: bars with the gate's bounds, the paired intervals, and the table of differences."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from components.records.steps import ROLES, Role, RuleResult, score_text
from components.report import charts
from components.report.html import clipped, count
from components.report.published import against_champion
from components.report.run_files import RunFiles
from components.shared.metrics import RELATIVE, Metric, is_metric, metric_of, metrics_of

OTHERS: tuple[Role, ...] = ("champion", "base")
"""The roles that the candidate is compared with, the more important first."""


@dataclass(frozen=True)
class Mark:
    """A bound that the gate sets: the position of a line over the bars, and its meaning."""

    position: float
    text: str
    passed: bool


@dataclass(frozen=True)
class Panel:
    """One metric's bars."""

    metric: Metric
    bars: tuple[charts.Bar, ...]
    marks: tuple[Mark, ...]

    @property
    def text(self) -> str:
        """The panel in words, for readers who cannot see it."""
        return f"{self.metric.title}: " + "; ".join(f"{bar.name} {bar.text}" for bar in self.bars)


@dataclass(frozen=True)
class MetricRow:
    """One line of the table of metrics."""

    metric: Metric
    values_by_role: Mapping[Role, str]
    gains: Mapping[Role, tuple[str, str]]
    """For each other model: the difference in words, and one of better, worse, same."""


@dataclass(frozen=True)
class RuleRow:
    """One line of the table of rules: the rule, and its numbers as text."""

    rule: RuleResult
    title: str
    candidate: str
    other: str
    bound: str


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
            for rule in _rules(run)
            if rule.metric == metric.key and rule.line is not None
        ]
        if not values or (metric.repeats and not bounds):  # without its own bound it would show the same picture twice
            continue
        axis = charts.axis_of([0.0, *values.values(), *(bound for bound, _, _ in bounds)])
        bars = tuple(
            charts.bar(axis, min(value, 0.0), max(value, 0.0), kind=role, name=called[role], text=metric.text(value))
            for role, value in values.items()
        )
        marks = tuple(Mark(axis.place(bound), text, passed) for bound, text, passed in bounds)
        result.append(Panel(metric, bars, marks))
    return result


def intervals(run: RunFiles) -> list[charts.Interval]:
    """The gain between its bounds for each comparison of the gate; without a gate, for each of the evaluation."""
    compared = (rule for rule in _rules(run) if rule.against and is_metric(rule.metric))
    decided = [rule for rule in compared if rule.lower is not None and rule.upper is not None]
    return [_of_rule(rule) for rule in decided] if decided else list(_of_evaluation(run))


def _of_rule(rule: RuleResult) -> charts.Interval:
    metric = metric_of(rule.metric or "")
    amounts = RELATIVE if rule.relative else metric
    assert rule.gain is not None
    assert rule.lower is not None
    assert rule.upper is not None
    words = amounts.range_text(rule.lower, rule.upper)
    bound = None if rule.line is None or rule.other is None else metric.gain(rule.line, rule.other)
    if bound is not None and rule.relative:
        bound /= abs(rule.other or 1.0)
    said = f"{metric.title}: {amounts.gain_text(rule.gain)}, {words}"
    return interval(rule.title, said, amounts, rule.gain, (rule.lower, rule.upper), bound)


def _of_evaluation(run: RunFiles) -> Iterator[charts.Interval]:
    called = names(run)
    for role in ROLES:
        found = run.evaluation.paired.get(role) if run.evaluation else None
        if found is None or found.ci95 is None or not is_metric(found.metric):
            continue
        metric = metric_of(found.metric)
        low, high = (metric.signed_text(end) for end in found.ci95)
        words = f"95 % interval {low} to {high}, {count(found.records)} records"
        name = f"Candidate against {called[role].lower() if role == 'base' else run.alias}"
        # For decisions of an earlier release, which compared the gain itself.
        lines = (
            metric.gain(rule.line, rule.other)
            for rule in _rules(run)
            if rule.against == role and rule.metric == metric.key and rule.line is not None and rule.other is not None
        )
        bound = next(lines, None)
        said = f"{metric.title}: {metric.gain_text(found.difference)}, {words}"
        yield interval(name, said, metric, found.difference, found.ci95, bound)


def interval(
    name: str, text: str, amounts: Metric, gain: float, ends: tuple[float, float], bound: float | None = None
) -> charts.Interval:
    """Place a gain, its ends, and the bound that it should reach, if any."""
    bound_text = "" if bound is None else f"required: {amounts.signed_text(bound)} or more"
    return charts.intervals_of([charts.Gain(name, "", gain, *ends, text)], bound, bound_text)[0]


def table(run: RunFiles) -> list[MetricRow]:
    """All metrics of the three models, with the candidate's differences."""
    rows = []
    broken = {rule.metric for rule in _rules(run) if not rule.passed}
    for metric in metrics_of(_measured(run)):
        values = {role: run.metric(role, metric.key) for role in ROLES}
        if all(value is None for value in values.values()):
            continue
        ours = values["candidate"]
        gains: dict[Role, tuple[str, str]] = {}
        for role in OTHERS:
            theirs = values[role]
            if ours is None or theirs is None:
                gains[role] = ("–", "same")  # noqa: RUF001 - a dash for a cell without a number
                continue
            words = metric.gain_text(metric.gain(ours, theirs))
            # Every training changes metrics outside the domain: a change is bad only if a rule says so.
            shown_as = ("better", "worse") if not metric.probe or metric.key in broken else ()
            gains[role] = (words, next((way for way in shown_as if words.endswith(way)), "same"))
        shown = {role: "–" if value is None else metric.text(value) for role, value in values.items()}  # noqa: RUF001
        rows.append(MetricRow(metric, shown, gains))
    return rows


def rules(run: RunFiles) -> list[RuleRow]:
    """The gate's rules: first the failed ones, then those undecided or waiting for a person, then those passed."""
    order = ["failed", "cannot tell", "needs approval", "passed"]
    rows = []
    for rule in sorted(_rules(run), key=lambda rule: order.index(rule.short)):
        metric = metric_of(rule.metric) if is_metric(rule.metric) else None
        ours, theirs = (
            metric.text(each) if metric and each is not None else "" for each in (rule.candidate, rule.other)
        )
        rows.append(RuleRow(rule, rule.title or rule.name.replace("_", " "), ours, theirs, rule.bound_text))
    return rows


def _measured(run: RunFiles) -> set[str]:
    """The keys of all metrics that were measured of any model."""
    return {key for role in ROLES if (model := run.model(role)) for key in model.metrics}


def _rules(run: RunFiles) -> tuple[RuleResult, ...]:
    return run.decision.rules if run.decision else ()


# The table of tasks of lm-evaluation-harness: each model's numbers with their standard errors.


@dataclass(frozen=True)
class HarnessRow:
    """One line of the table."""

    task: str
    metric: str
    texts: Mapping[Role, str]


@dataclass(frozen=True)
class HarnessTable:
    """The whole table, and how its numbers were measured."""

    rows: tuple[HarnessRow, ...]
    lm_eval: str
    limit: int | None
    left_out: str


def harness(run: RunFiles) -> HarnessTable | None:
    """The results of the tasks of lm-evaluation-harness; None if none were asked for."""
    found = run.evaluation.harness if run.evaluation else None
    if found is None:
        return None
    rows = tuple(
        HarnessRow(task, metric, {role: score_text(found.score(role, task, metric)) for role in ROLES})
        for task, metric in found.rows
    )
    return HarnessTable(rows, found.lm_eval, found.limit, found.left_out)


# Gains on one axis: on each kind of record, and of each decision so far.


def slices(run: RunFiles) -> charts.Forest | None:
    """The findings of the gate's rule on slices, worst first; None if it had no slice to judge."""
    rule = next((rule for rule in _rules(run) if rule.slices), None)
    if rule is None:
        return None
    metric, bound = metric_of(rule.metric or ""), -(rule.bound or 0.0)
    amounts = RELATIVE if rule.relative else metric
    gains = [
        charts.Gain(
            f"{each.kind}: {clipped(each.name)}",
            f"{count(each.records)} records",
            each.gain,
            each.lower,
            each.upper,
            charts.bounded_text(amounts, each.gain, each.lower, each.upper),
            bad=each.worse,
        )
        for each in rule.slices
    ]
    note = (
        f"{metric.title}, candidate against champion on each kind of record, each bound with "
        f"{(rule.confidence or 0) * 100:.4g} % confidence, so that all of them hold together. Solid: no difference. "
        f"Dashed: {amounts.signed_text(bound)}, below which a slice must not be shown to lie."
    )
    return charts.Forest(charts.intervals_of(gains, bound), note)


def past_decisions(run: RunFiles) -> charts.Forest | None:
    """What the gate decided on this alias before by the same metric, each time on the gain over the champion of that
    day, the newest first; None where this is the only decision."""
    rule = against_champion(run.decision) if run.decision else None
    if run.decision is None or rule is None or not rule.metric:
        return None
    amounts = RELATIVE if rule.relative else metric_of(rule.metric)
    gains = [
        charts.Gain(
            each.run_id,
            each.verdict or each.decision,
            gain := judged.gain or 0.0,
            judged.lower,
            judged.upper,
            charts.bounded_text(amounts, gain, judged.lower, judged.upper),
            bad=not each.promoted,
        )
        for each in (run.decision, *run.decided_before)
        if (judged := against_champion(each)) and (judged.metric, judged.relative) == (rule.metric, rule.relative)
    ]
    if len(gains) < 2:
        return None
    bound = -(rule.bound or 0.0)
    note = (
        f"{metric_of(rule.metric).title}, each run's candidate against the champion of its day, between its bounds. "
        f"Solid: no difference. Dashed: {amounts.signed_text(bound)}, what this run's candidate had to stay above."
    )
    return charts.Forest(charts.intervals_of(gains, bound), note)
