"""What the gate decided on this alias before, each time on the gain over the champion of that day."""

from components.records.steps import Decision, RuleResult
from components.report import forest
from components.report.run_files import RunFiles
from components.shared.metrics import RELATIVE, metric_of


def past_decisions(run: RunFiles) -> forest.Picture | None:
    """Decisions that compared by the same metric as this run's, the newest first; None where this is the only one."""
    rule = against_champion(run.decision) if run.decision else None
    if run.decision is None or rule is None or not rule.metric:
        return None
    amounts = RELATIVE if rule.relative else metric_of(rule.metric)
    gains = [
        forest.Gain(
            each.run_id,
            each.verdict or each.decision,
            found.gain or 0.0,
            found.lower,
            found.upper,
            bad=not each.promoted,
        )
        for each in (run.decision, *run.decided_before)
        if (found := against_champion(each)) and (found.metric, found.relative) == (rule.metric, rule.relative)
    ]
    if len(gains) < 2:
        return None
    bound = -(rule.bound or 0.0)
    note = (
        f"{metric_of(rule.metric).title}, each run's candidate against the champion of its day, between its bounds. "
        f"Solid: no difference. Dashed: {amounts.signed_text(bound)}, what this run's candidate had to stay above."
    )
    return forest.draw(gains, bound=bound, amounts=amounts, note=note)


def against_champion(decision: Decision) -> RuleResult | None:
    """The rule that compared the candidate with the champion and set a bound at least; None where there was none."""
    rules = (rule for rule in decision.rules if rule.name == "not_worse_than_champion")
    return next((rule for rule in rules if (rule.lower, rule.upper) != (None, None)), None)
