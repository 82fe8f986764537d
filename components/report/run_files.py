"""What a finished, held, skipped or failed run left behind, as far as it got."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation, Measured, Role, StepRecord, Took
from components.records.sweep import SweepResult, TunedRate
from components.registry.lineage import of_record, trained
from components.report.adapter_files import AdapterFiles
from components.report.html import count, parse_moment
from components.shared.metrics import METRICS
from components.shared.parquet import table_of

# What the candidate got wrong: every wrong answer, and counts by class if the answers are classes.

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


@dataclass(frozen=True)
class Afresh:
    """A version like the candidate that was trained from the base, with its own run's comparison."""

    version: str
    evaluation: Evaluation


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
    decided_before: Sequence[Decision] = ()
    """Decisions of earlier runs on the same alias, the newest first."""
    sweep: SweepResult | None = None
    """Result of this run's sweep; None if its learning rate was not swept for, or was by an earlier run."""
    rate: TunedRate | None = None
    steps: Sequence[StepRecord] = ()
    """Records of the steps, in any order."""
    profile: Mapping[str, Any] | None = None
    replayed: Replayed | None = None
    """Record of the replay, for a run whose earlier records production answered."""
    lineage: Mapping[str, Any] | None = None
    afresh: Afresh | None = None
    """The comparable version trained from the base, for a run that went on from a version."""
    generated_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def step(self, name: str) -> StepRecord | None:
        """Return the record of one step; None if it did not run."""
        return next((step for step in self.steps if step.step == name), None)

    def model(self, role: Role) -> Measured | None:
        """Return the evaluation of one model; None if it was not evaluated."""
        return self.evaluation.model(role) if self.evaluation else None

    def metric(self, role: Role, key: str) -> float | None:
        """Return one metric of one model; None if it was not measured or is not finite."""
        return self.evaluation.metric(role, key) if self.evaluation else None

    @property
    def version(self) -> str | None:
        """The candidate's version, from the decision, the evaluation or the finetune step's result."""
        decided, measured = self.decision, self.model("candidate")
        found = (decided and decided.version) or (measured and measured.version)
        return found or self._result("finetune").get("version")

    @property
    def dataset_id(self) -> str | None:
        """The dataset's id, from the evaluation or the prepare step's result."""
        return (self.evaluation and self.evaluation.dataset_id) or self._result("prepare").get("dataset_id")

    @property
    def until_compared_s(self) -> float | None:
        """Seconds from the training's last step to the first compared records; None if either time is unknown."""
        trained = parse_moment(self._result("finetune").get("trained_at"))
        compared = parse_moment(self.evaluation.first_scored_at) if self.evaluation else None
        return (compared - trained).total_seconds() if trained and compared else None

    @property
    def until_first_step(self) -> list[Took]:
        """Parts of the time from the finetune step's start to the first training step; empty if unknown."""
        step, result = self.step("finetune"), self._result("finetune")
        began, submitted = parse_moment(result.get("began_at")), parse_moment(step.started_at) if step else None
        if began is None or submitted is None:
            return []
        first = Took(part="Ray job", seconds=(began - submitted).total_seconds())
        return [first, *(Took.model_validate(each) for each in result.get("until_first_step", []))]

    def _result(self, step: str) -> Mapping[str, Any]:
        record = self.step(step)
        return record.result if record else {}


# What a run gained by going on from a version, compared with one that started afresh on the same data.


def parent_of(lineage: Mapping[str, Any] | None) -> str | None:
    """The version that the training went on from; None if it started afresh."""
    parents = [each.name for each in of_record(lineage or {}) if each.kind == "parent"]
    return parents[0].rpartition("/")[2] if parents else None


def find_afresh(files: AdapterFiles, run: RunFiles) -> Afresh | None:
    """The newest version that was trained from the base on the same dataset, with the config otherwise the same.

    None if there is none, or it was compared on other records.
    """
    if run.lineage is None or run.evaluation is None or parent_of(run.lineage) is None:
        return None
    wanted = {**trained(run.lineage), "dataset": run.evaluation.dataset_id, "parent": ""}
    for version, entry in files.entries.items():
        evaluation = entry.evaluation if entry.trained == wanted else None
        if evaluation is not None and evaluation.records == run.evaluation.records:
            return Afresh(version, evaluation)
    return None


def sentence(run: RunFiles) -> str:
    """Say where the training began, and what that gained if both ways were run; empty if it started afresh."""
    parent = parent_of(run.lineage)
    if parent is None:
        return ""
    ours = run.metric("candidate", "loss")
    theirs = run.afresh.evaluation.metric("candidate", "loss") if run.afresh else None
    if run.afresh is None or ours is None or theirs is None:
        return f"It went on from {parent}."
    loss = METRICS["loss"]
    gained = f"{loss.gain_text(loss.gain(ours, theirs))} in {loss.unit}"
    return (
        f"It went on from {parent}. Compared with {run.afresh.version}, which the same config trained from the base "
        f"on the same data: {gained}, as far as one run of each can tell."
    )
