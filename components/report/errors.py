"""What the candidate got wrong: every wrong answer, and counts by class if the answers are classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.report.html import count
from components.shared.parquet import table_of

_ANSWER, _RIGHT = "candidate_answer", "candidate_exact_match"
_MISTAKEN_FOR = 3


@dataclass(frozen=True)
class Wrong:
    """An answer that is not the reference."""

    id: str
    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class OfClass:
    """How the records of one class were answered."""

    name: str
    records: int
    right: int
    mistaken_for: str

    @property
    def share(self) -> str:
        """Share of the class's records that were answered right, in per cent."""
        return f"{self.right / self.records:.0%}"


@dataclass(frozen=True)
class Matrix:
    """Counts of answers, a row for each class and a column for each answer."""

    labels: Sequence[str]
    rows: Sequence[tuple[str, Sequence[int]]]


def wrong_answers(body: bytes) -> list[Wrong]:
    """Return the wrong answers in evaluation_records.parquet; empty if it does not say which answers are right."""
    table = table_of(body)
    if not {"id", "prompt", "reference", _ANSWER, _RIGHT} <= {*table.column_names}:
        return []
    rows = table.select(["id", "prompt", "reference", _ANSWER, _RIGHT]).to_pylist()
    return [
        Wrong(str(row["id"]), last_turn(str(row["prompt"])), str(row["reference"]), str(row[_ANSWER]))
        for row in rows
        if row[_RIGHT] == 0
    ]


def last_turn(prompt: str) -> str:
    """Return the last turn of a prompt in the format of evaluation_records.parquet."""
    turns = json.loads(prompt) if prompt.startswith("[") else []
    return str(turns[-1][1]) if turns else prompt


def by_class(confusion: Mapping[str, Any] | None) -> list[OfClass]:
    """Return the classes that records ask for, those with the smallest share of right answers first."""
    if not confusion:
        return []
    labels: list[str] = confusion["labels"]
    found = []
    for place, (name, counts) in enumerate(zip(labels, confusion["counts"], strict=True)):
        if records := sum(counts):
            others = sorted(
                ((number, labels[other]) for other, number in enumerate(counts) if number and other != place),
                key=lambda each: -each[0],
            )
            taken_for = ", ".join(f"{label} ({count(number)})" for number, label in others[:_MISTAKEN_FOR])
            found.append(OfClass(name, records, counts[place], taken_for))
    return sorted(found, key=lambda each: each.right / each.records)


def matrix(confusion: Mapping[str, Any] | None) -> Matrix | None:
    """Return all counts; rows of classes that no record asks for are left out."""
    if not confusion:
        return None
    rows = [pair for pair in zip(confusion["labels"], confusion["counts"], strict=True) if sum(pair[1])]
    return Matrix(confusion["labels"], rows)
