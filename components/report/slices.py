"""Draws the gain on each kind of record."""

from components.report import forest
from components.report.numbers import count
from components.report.run_files import RunFiles
from components.report.sections import clipped
from components.shared.metrics import RELATIVE, metric_of


def slices(run: RunFiles) -> forest.Picture | None:
    """The findings of the gate's rule on slices, worst first; None if it had no slice to judge."""
    rule = next((rule for rule in run.decision.rules if rule.slices), None) if run.decision else None
    if rule is None:
        return None
    metric, bound = metric_of(rule.metric or ""), -(rule.bound or 0.0)
    amounts = RELATIVE if rule.relative else metric
    gains = [
        forest.Gain(
            f"{each.kind}: {clipped(each.name)}",
            f"{count(each.records)} records",
            each.gain,
            each.lower,
            each.upper,
            bad=each.worse,
        )
        for each in rule.slices
    ]
    note = (
        f"{metric.title}, candidate against champion on each kind of record, each bound with "
        f"{(rule.confidence or 0) * 100:.4g} % confidence, so that all of them hold together. Solid: no difference. "
        f"Dashed: {amounts.signed_text(bound)}, below which a slice must not be shown to lie."
    )
    return forest.draw(gains, bound=bound, amounts=amounts, note=note)
