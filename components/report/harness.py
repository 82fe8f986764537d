"""The table of tasks of lm-evaluation-harness: each model's numbers with their standard errors."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.records.harness import score_text
from components.records.steps import ROLES, Role
from components.report.run_files import RunFiles


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
