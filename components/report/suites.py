"""The table of suites: how many questions outside the domain each model passes, and what so few can show."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.config.gate import GateConfig
from components.records.steps import ROLES, LostItem, Role, Suite, score_text
from components.report.run_files import RunFiles
from components.report.sections import clipped
from components.shared.paired import least_loss, mcnemar


@dataclass(frozen=True)
class SuiteRow:
    """One line of the table."""

    title: str
    meaning: str
    items: int
    left_out: str
    passed: Mapping[Role, str]
    against: Mapping[Role, tuple[str, str]]
    """For each other model: the difference in words, and one of better, worse, same."""
    least_loss: str
    """The smallest number of lost items that shows, as text."""
    lost: tuple[LostItem, ...]


@dataclass(frozen=True)
class SuiteTable:
    """The whole table, with the margin and the confidence of all rows."""

    rows: tuple[SuiteRow, ...]
    margin: str
    """How much worse the candidate may be; empty for not at all."""
    sure: str


def suites(run: RunFiles) -> SuiteTable | None:
    """The table of the suites that were asked; None if none were."""
    if run.evaluation is None or not run.evaluation.suites:
        return None
    policy = run.decision.policy if run.decision else {}
    confidence = policy.get("confidence", GateConfig().confidence)
    margin = policy.get("suite_worse_by") or 0.0
    rows = tuple(_row(suite, margin, confidence) for suite in run.evaluation.suites)
    return SuiteTable(rows, margin=f"{margin * 100:.10g} points" if margin else "", sure=f"{confidence * 100:.6g} %")


def _row(suite: Suite, margin: float, confidence: float) -> SuiteRow:
    least = least_loss(suite.items, margin, confidence)
    return SuiteRow(
        title=suite.title,
        meaning=suite.meaning,
        items=suite.items,
        left_out=suite.left_out,
        passed={role: _count(suite.passed(role)) for role in ROLES},
        against={role: _difference(suite, role) for role in ROLES if role != "candidate"},
        least_loss="none" if least is None else str(least),
        lost=tuple(LostItem(prompt=each.prompt, answer=clipped(each.answer)) for each in suite.lost),
    )


def _count(passed: int | None) -> str:
    return "–" if passed is None else str(passed)  # noqa: RUF001 - a dash for a cell without a number


def _difference(suite: Suite, against: Role) -> tuple[str, str]:
    counts = suite.won_and_lost(against)
    if counts is None:
        return "–", "same"  # noqa: RUF001 - a dash for a cell without a number
    won, lost = counts
    if won == lost == 0:
        return "the same", "same"
    way = "better" if won > lost else "worse" if lost > won else "same"
    amount = f"{abs(won - lost)} {way}" if won != lost else "the same"
    return f"{amount} ({won} won, {lost} lost; {mcnemar(won, lost):.2g})", way


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
