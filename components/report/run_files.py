"""What a finished, held, skipped or failed run left behind, as far as it got."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation, Measured, Role, RuleResult, StepRecord, Took
from components.records.sweep import SweepResult, TunedRate
from components.report.html import count, parse_moment
from components.shared.parquet import table_of

# What the candidate got wrong: every wrong answer, and counts by class if the answers are classes.

_COLUMNS = ["id", "prompt", "reference", "candidate_answer", "candidate_exact_match"]
_MISTAKEN_FOR = 3


@dataclass(frozen=True)
class Wrong:
    """An answer that is not the reference."""

    id: str
    prompt: str
    reference: str
    answer: str


def wrong_answers(body: bytes) -> list[Wrong]:
    """Return the wrong answers in evaluation_records.parquet; empty if it does not say which answers are right."""
    table = table_of(body)
    if not {*_COLUMNS} <= {*table.column_names}:
        return []
    rows = zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True)
    return [
        Wrong(str(name), last_turn(str(prompt)), str(reference), str(answer))
        for name, prompt, reference, answer, right in rows
        if right == 0
    ]


def last_turn(prompt: str) -> str:
    """Return the last turn of a prompt in the format of evaluation_records.parquet."""
    turns = json.loads(prompt) if prompt.startswith("[") else []
    return str(turns[-1][1]) if turns else prompt


def by_class(confusion: Mapping[str, Any] | None) -> list[tuple[str, int, float, str]]:
    """Return the classes that records ask for, those with the smallest share of right answers first: name, number of
    records, share of right answers, and the classes that it is most often taken for."""
    rows = []
    labels, matrix = (confusion["labels"], confusion["counts"]) if confusion else ([], [])
    for place, (name, counts) in enumerate(zip(labels, matrix, strict=True)):
        if records := sum(counts):
            others = [(number, labels[other]) for other, number in enumerate(counts) if number and other != place]
            others.sort(key=lambda pair: -pair[0])
            taken_for = ", ".join(f"{label} ({count(number)})" for number, label in others[:_MISTAKEN_FOR])
            rows.append((name, records, counts[place] / records, taken_for))
    return sorted(rows, key=lambda row: row[2])


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report is made of. Only the names are certain; the rest may be missing."""

    run_id: str
    adapter: str
    alias: str = "production"
    note: str = ""
    """What the run was for, as noted by the person who started it."""
    config_toml: str = ""
    config_digest: str = ""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Records of metrics.jsonl."""
    evaluation: Evaluation | None = None
    wrong: Sequence[Wrong] = ()
    """The candidate's wrong answers, one per record."""
    decision: Decision | None = None
    sweep: SweepResult | None = None
    """Result of this run's sweep; None if its learning rate was not swept for, or was by an earlier run."""
    rate: TunedRate | None = None
    steps: Sequence[StepRecord] = ()
    """Records of the steps, in any order."""
    profile: Mapping[str, Any] | None = None
    replayed: Replayed | None = None
    """Record of the replay, for a run whose earlier records production answered."""
    lineage: Mapping[str, Any] | None = None
    generated_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def step(self, name: str) -> StepRecord | None:
        return next((step for step in self.steps if step.step == name), None)

    def result(self, name: str) -> Mapping[str, Any]:
        step = self.step(name)
        return step.result if step else {}

    def model(self, role: Role) -> Measured | None:
        return self.evaluation.model(role) if self.evaluation else None

    def metric(self, role: Role, key: str) -> float | None:
        return self.evaluation.metric(role, key) if self.evaluation else None

    @property
    def rules(self) -> tuple[RuleResult, ...]:
        return self.decision.rules if self.decision else ()

    @property
    def version(self) -> str | None:
        """The candidate's version, from the decision, the evaluation or the finetune step's result."""
        decided, measured = self.decision, self.model("candidate")
        version = (decided and decided.version) or (measured and measured.version)
        return version or self.result("finetune").get("version")

    @property
    def dataset_id(self) -> str | None:
        """The dataset's id, from the evaluation or the prepare step's result."""
        return (self.evaluation and self.evaluation.dataset_id) or self.result("prepare").get("dataset_id")

    @property
    def until_compared_s(self) -> float | None:
        """Seconds from the training's last step to the first compared records; None if either time is unknown."""
        trained = parse_moment(self.result("finetune").get("trained_at"))
        compared = parse_moment(self.evaluation.first_scored_at) if self.evaluation else None
        return (compared - trained).total_seconds() if trained and compared else None

    @property
    def until_first_step(self) -> list[Took]:
        """Parts of the time from the finetune step's start to the first training step; empty if unknown."""
        step, result = self.step("finetune"), self.result("finetune")
        began, submitted = parse_moment(result.get("began_at")), parse_moment(step.started_at) if step else None
        if began is None or submitted is None:
            return []
        first = Took(part="Ray job", seconds=(began - submitted).total_seconds())
        return [first, *(Took.model_validate(part) for part in result.get("until_first_step", []))]
