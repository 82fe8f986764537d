"""The decision as Markdown, which the Kubeflow UI shows with the step; pure."""

from components.records.steps import Decision, RuleResult
from components.shared.metrics import metric_of


def as_markdown(decision: Decision) -> str:
    """The decision as Markdown: the outcome, the reasons, and every rule with the numbers that it compared."""
    place = f"{decision.adapter}@{decision.alias}"
    headline = f"{place} takes {decision.version}" if decision.promoted else f"{place} stays as it is"
    lines = [
        f"# {(decision.verdict or decision.decision).capitalize()}: {headline}",
        "",
        *[f"- {_cell(reason)}" for reason in decision.reasons],
        "",
        "| | rule | candidate | other | bound | setting |",
        "|---|---|---|---|---|---|",
        *[_row(rule) for rule in decision.rules],
        "",
        f"Compared with {decision.champion or 'no version, because the alias is empty'}.",
    ]
    return "\n".join(lines) + "\n"


def _row(rule: RuleResult) -> str:
    cells = [
        rule.short if rule.passed else f"**{rule.short}**",
        rule.title,
        _number(rule, rule.candidate),
        _number(rule, rule.other),
        rule.bound_text,
        f"`{rule.field}`",
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _number(rule: RuleResult, value: float | None) -> str:
    return "" if value is None or rule.metric is None else metric_of(rule.metric).text(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
