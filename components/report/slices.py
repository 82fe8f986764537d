"""The gain on each kind of record, between its bounds, on one axis."""

from dataclasses import dataclass

from components.registry.records import RuleResult
from components.report.numbers import count
from components.report.run_files import RunFiles
from components.report.sections import clipped
from components.shared.metrics import RELATIVE, metric_of


@dataclass(frozen=True)
class Row:
    """One slice. Places are in per cent of the axis."""

    name: str
    records: str
    position: float
    low: float
    high: float
    text: str
    worse: bool


@dataclass(frozen=True)
class Picture:
    """All of them, the worst first."""

    rows: tuple[Row, ...]
    zero: float
    bound: float
    note: str


def slices(run: RunFiles) -> Picture | None:
    """What the gate's rule on slices has found; None where it had none to judge."""
    rule = next((rule for rule in run.decision.rules if rule.slices), None) if run.decision else None
    return _picture(rule) if rule else None


def _picture(rule: RuleResult) -> Picture:
    metric, bound = metric_of(rule.metric or ""), -(rule.bound or 0.0)
    amounts = RELATIVE if rule.relative else metric
    marks = [0.0, bound, *(end for each in rule.slices for end in (each.lower, each.upper))]
    pad = (max(marks) - min(marks)) * 0.03 or 1.0
    start, span = min(marks) - pad, max(marks) - min(marks) + 2 * pad

    def place(value: float) -> float:
        return (value - start) / span * 100

    rows = tuple(
        Row(
            name=f"{each.kind}: {clipped(each.name)}",
            records=count(each.records),
            position=place(each.gain),
            low=place(each.lower),
            high=place(each.upper),
            text="{} ({} to {})".format(*map(amounts.signed_text, (each.gain, each.lower, each.upper))),
            worse=each.worse,
        )
        for each in rule.slices
    )
    note = (
        f"{metric.title}, candidate against champion on each kind of record, each bound with "
        f"{(rule.confidence or 0) * 100:.4g} % confidence, so that all of them hold together. Solid: no difference. "
        f"Dashed: {amounts.signed_text(bound)}, below which a slice must not be shown to lie."
    )
    return Picture(rows, place(0.0), place(bound), note)
