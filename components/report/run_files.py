"""What a finished, held, skipped or failed run left behind, as far as it got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation, Measured, Role, StepRecord, Took
from components.records.sweep import SweepResult, TunedRate
from components.report.errors import Wrong
from components.report.html import parse_moment


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
