"""The decision as Markdown, which the Kubeflow UI shows with the step; pure."""

from components.config.schema import RunConfig
from components.gate.policy import GateDecision, Rule
from components.gate.sentences import bound_text, value_text


def as_markdown(decision: GateDecision, config: RunConfig) -> str:
    """What was decided, why, and every rule with the numbers that it compared."""
    name, alias = config.adapter.name, config.adapter.alias
    headline = f"{name}@{alias} takes {decision.version}" if decision.promoted else f"{name}@{alias} stays as it is"
    lines = [
        f"# {'Promote' if decision.promoted else 'Hold'}: {headline}",
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


def _row(rule: Rule) -> str:
    cells = [
        "passed" if rule.passed else "**failed**",
        rule.name.replace("_", " "),
        _number(rule, rule.candidate),
        _number(rule, rule.other),
        "" if rule.bound is None else bound_text(rule.metric or "loss", rule.bound),
        f"`{rule.field}`",
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _number(rule: Rule, value: float | None) -> str:
    return "" if value is None or rule.metric is None else value_text(rule.metric, value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
