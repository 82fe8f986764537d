"""The three models side by side: bars with the gate's bounds, the paired intervals, and the table of differences."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.report.numbers import BY_KEY, METRICS, Metric, count
from components.report.run_files import RunFiles, finite

ROLES = ("base", "champion", "candidate")


@dataclass(frozen=True)
class Bar:
    """One model's value. `start` and `width` are in per cent of the track."""

    role: str
    name: str
    start: float
    width: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A bound that the gate sets: a line over the bars and its meaning."""

    position: float
    text: str
    passed: bool


@dataclass(frozen=True)
class Panel:
    """One metric's bars."""

    metric: Metric
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]

    @property
    def text(self) -> str:
        """The panel for those who do not see it."""
        return f"{self.metric.label}: " + "; ".join(f"{bar.name} {bar.text}" for bar in self.bars)


@dataclass(frozen=True)
class Interval:
    """The paired difference to one other model with its 95 % interval, in per cent of its own axis."""

    name: str
    text: str
    position: float
    low: float
    high: float
    zero: float
    bound: float | None
    bound_text: str


@dataclass(frozen=True)
class Row:
    """One line of the table of metrics."""

    metric: Metric
    values_by_role: Mapping[str, str]
    gains: Mapping[str, tuple[str, str]]
    """Per other model: the words, and one of better, worse, same."""


def names(run: RunFiles) -> dict[str, str]:
    """What the page calls each role; the champion goes by its alias."""
    return {"base": "Base model", "champion": run.alias.capitalize(), "candidate": "Candidate"}


def panels(run: RunFiles) -> list[Panel]:
    """One panel for each metric that was measured."""
    called = names(run)
    result = []
    for metric in METRICS:
        values = {role: value for role in ROLES if (value := run.metric(role, metric.key)) is not None}
        bounds = list(_bounds(run, metric))
        # Perplexity is exp(loss): without a bound of its own it would be the same picture twice.
        if not values or (metric.key == "perplexity" and not bounds):
            continue
        low = min(0.0, *values.values(), *(bound for bound, _, _ in bounds))
        high = max(0.0, *values.values(), *(bound for bound, _, _ in bounds))
        span = (high - low) or 1.0
        bars = tuple(
            Bar(
                role,
                called[role],
                start=(min(value, 0.0) - low) / span * 100,
                width=max(abs(value) / span * 100, 0.4),
                text=metric.text(value),
            )
            for role, value in values.items()
        )
        marks = tuple(Mark((bound - low) / span * 100, text, passed) for bound, text, passed in bounds)
        result.append(Panel(metric, bars, marks))
    return result


def intervals(run: RunFiles) -> list[Interval]:
    """The paired comparisons of the evaluation, base first."""
    paired = (run.evaluation or {}).get("paired") or {}
    rules = {rule["name"]: rule for rule in (run.decision or {}).get("rules", [])}
    called = names(run)
    result = []
    for role, rule_name, sign in (("base", "better_than_base", 1), ("champion", "not_worse_than_champion", -1)):
        found = paired.get(role)
        if not found or found.get("metric") not in BY_KEY or not found.get("ci95"):
            continue
        difference, low, high = finite(found["difference"]), *(finite(end) for end in found["ci95"])
        if difference is None or low is None or high is None:
            continue
        metric = BY_KEY[found["metric"]]
        bound = finite(rules.get(rule_name, {}).get("bound"))
        bound = sign * bound if bound is not None else None
        ends = [0.0, low, high, difference, *([bound] if bound is not None else [])]
        pad = (max(ends) - min(ends)) * 0.06 or 1.0
        start, span = min(ends) - pad, max(ends) - min(ends) + 2 * pad
        result.append(
            Interval(
                name=f"Candidate against {called[role].lower() if role == 'base' else run.alias}",
                text=(
                    f"{metric.label}: {metric.gain_text(difference)}, 95 % interval {metric.signed(low)} to "
                    f"{metric.signed(high)}{' points' if metric.is_share else ''}, {count(found['records'])} records"
                ),
                position=(difference - start) / span * 100,
                low=(low - start) / span * 100,
                high=(high - start) / span * 100,
                zero=-start / span * 100,
                bound=None if bound is None else (bound - start) / span * 100,
                bound_text="" if bound is None else f"required: {metric.signed(bound)} or more",
            )
        )
    return result


def table(run: RunFiles) -> list[Row]:
    """Every metric of the three models with the candidate's differences."""
    rows = []
    for metric in METRICS:
        values = {role: run.metric(role, metric.key) for role in ROLES}
        if all(value is None for value in values.values()):
            continue
        ours = values["candidate"]
        gains = {}
        for role in ("champion", "base"):
            theirs = values[role]
            if ours is None or theirs is None:
                gains[role] = ("–", "same")  # noqa: RUF001 - a dash for a cell without a number
                continue
            words = metric.gain_text(metric.gain(ours, theirs))
            gains[role] = (words, next((way for way in ("better", "worse") if words.endswith(way)), "same"))
        shown = {role: "–" if value is None else metric.text(value) for role, value in values.items()}  # noqa: RUF001
        rows.append(Row(metric, shown, gains))
    return rows


def rules(run: RunFiles) -> list[dict[str, Any]]:
    """The gate's rules, with their numbers as text."""
    result = []
    for rule in (run.decision or {}).get("rules", []):
        metric = BY_KEY.get(rule.get("metric") or "")
        bound = finite(rule.get("bound"))
        numbers = {
            key: metric.text(value) if metric and (value := finite(rule.get(key))) is not None else ""
            for key in ("candidate", "other")
        }
        shown = "" if bound is None or metric is None else _bound_text(rule["name"], metric, bound)
        result.append({**rule, **numbers, "title": _rule_title(rule["name"], metric, run.alias), "bound": shown})
    return result


def _bounds(run: RunFiles, metric: Metric) -> Iterable[tuple[float, str, bool]]:
    """Where the gate's rules draw a line on this metric's own axis: the value, its meaning, and whether it was kept."""
    for rule in (run.decision or {}).get("rules", []):
        bound, other = finite(rule.get("bound")), finite(rule.get("other"))
        if rule.get("metric") != metric.key or bound is None:
            continue
        name, passed = rule["name"], bool(rule["passed"])
        side = "at most" if metric.lower_is_better else "at least"
        if name in ("limit_min", "limit_max"):
            yield bound, f"limit: {'at least' if name == 'limit_min' else 'at most'} {metric.text(bound)}", passed
        elif name == "better_than_base" and other is not None:
            line = other - bound if metric.lower_is_better else other + bound
            yield line, f"{side} {metric.text(line)}, to beat the base", passed
        elif name == "not_worse_than_champion" and other is not None:
            line = other + bound if metric.lower_is_better else other - bound
            yield line, f"{side} {metric.text(line)}, not to fall behind {run.alias}", passed


def _rule_title(name: str, metric: Metric | None, alias: str) -> str:
    if name == "limit_min" and metric is BY_KEY["prompt_gain"]:
        return "Answers depend on their prompts"
    label = metric.label if metric else ""
    return {
        "new_version": "Is a new version",
        "better_than_base": f"{label} better than the base model's",
        "not_worse_than_champion": f"{label} not worse than {alias}'s",
        "limit_min": f"{label} high enough",
        "limit_max": f"{label} low enough",
        "finite_numbers": f"{label} is a sound number",
    }.get(name, name.replace("_", " "))


def _bound_text(name: str, metric: Metric, bound: float) -> str:
    margin = f"{bound * 100:g} points" if metric.is_share else f"{bound:g}"
    value = f"{bound * 100:g} %" if metric.is_share else f"{bound:g}"
    return {
        "better_than_base": f"better by at least {margin}",
        "not_worse_than_champion": f"worse by at most {margin}",
        "limit_min": f"at least {value}",
        "limit_max": f"at most {value}",
    }.get(name, value)
