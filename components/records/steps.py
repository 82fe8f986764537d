"""What the steps of a run leave for each other, as frozen types; `runs` knows where each lies.

Reading is tolerant: a key that this release does not know stays in the record. `format` rises only when an older reader
would misunderstand a record, which it then refuses; release 0.1.0 wrote none, and means 1.
"""

import hashlib
import math
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationError

from components.records.harness import HarnessScores
from components.records.part import Part
from components.records.suites import Suite
from components.records.usage import Usage
from components.shared.errors import IntegrityError
from components.store.store import decode_json, encode_json

Role = Literal["base", "champion", "candidate", "anchor"]
ROLES: tuple[Role, ...] = ("base", "champion", "candidate")
"""The models of every comparison. The anchor, the best version so far, is measured where the champion is another."""
Outcome = Literal["promote", "hold", "skipped"]
Verdict = Literal["promote", "hold", "cannot tell", "needs approval"]
Status = Literal["succeeded", "failed"]


class Record(Part):
    """One JSON object of a run."""

    FILE: ClassVar[str]
    FORMAT: ClassVar[int] = 1

    format: int = 1

    @classmethod
    def from_json(cls, body: bytes, uri: str) -> Self:
        """Parse a record.

        Raises:
            IntegrityError: it is not JSON, lacks a key, has one of another type, or is of a later format.
        """
        value = decode_json(body, uri)
        written = value.get("format") if isinstance(value, dict) else None
        if isinstance(written, int) and written > cls.FORMAT:
            raise IntegrityError(
                f"{uri} has format {written}, and this release of Fineloop reads {cls.FORMAT}: upgrade it"
            )
        try:
            return cls.model_validate_json(body)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise IntegrityError(f"{uri} is no sound {cls.FILE}: {where}: {first['msg']}") from exc

    def as_json(self) -> bytes:
        """Canonical JSON; a number that is not finite becomes null."""
        return encode_json(decode_json(self.model_dump_json().encode(), self.FILE))

    @property
    def sha256(self) -> str:
        """Of the record as it is written."""
        return hashlib.sha256(self.as_json()).hexdigest()


class Prepared(Record):
    """What the Ray job that prepared a run's data leaves for the step that waits for it."""

    FILE: ClassVar[str] = "prepared.json"

    result: dict[str, Any]
    """What the step records: the dataset, or why the run was skipped."""


class StepRecord(Record):
    """How one step went."""

    FILE: ClassVar[str] = "steps/<step>.json"

    step: str
    status: Status
    started_at: str
    """ISO 8601, with its zone."""
    seconds: float
    result: dict[str, Any] = {}
    """What the step gave; of a failed one `error` with kind and message."""

    @property
    def succeeded(self) -> bool:
        return self.status == "succeeded"

    @property
    def moved_alias(self) -> bool:
        """Whether it promoted, even where it failed after that."""
        return self.step == "promote" and (self.succeeded or "event_uri" in self.result)


class Took(Part):
    """A part of what was waited for."""

    part: str
    seconds: float


class TrainResult(Record):
    """What the training published."""

    FILE: ClassVar[str] = "finetune.json"

    version: str
    version_uri: str
    manifest_sha256: str = ""
    """Of the version, as published; empty where an earlier release wrote this."""
    dataset_uri: str = ""
    train_seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None
    eval_loss: float | None = None
    """Held-out loss of what was published, on the records that training looks at."""
    stopped_early: bool = False
    resumed_from_step: int | None = None
    trained_at: str = ""
    """When the last step had been taken, before anything was published; ISO 8601, with its zone."""
    began_at: str = ""
    """When the job began, as `trained_at`."""
    until_first_step: list[Took] = []
    """What passed from then to the first step, one part after the other."""
    usage: Usage | None = None
    """None where an earlier release wrote this."""


class Measured(Part):
    """One model of a comparison."""

    version: str | None = None
    """None of the base, which is no version."""
    metrics: dict[str, float | None]
    """By the keys of `METRICS`; None where it was not measured."""


class TextLosses(Part):
    """How surprising each model finds texts that are no held-out records: general text, or the base's own answers."""

    text_sha256: str
    """Of the texts, as the base's tokenizer reads them."""
    base_format: str = ""
    """What the base was in: bf16, nf4 or int8."""
    tokens: list[int]
    """Of each text; of an answer, without its prompt."""
    nll: dict[Role, list[float]]
    """-log p of each text, in nats; roles on another base than the candidate's are left out."""
    asked_sha256: str | None = None
    """Of what the base was asked, and how its answers were drawn; None of texts that are no answers."""
    answers: list[list[int]] | None = None
    """The tokens of each answer of the base's; None of texts that are none."""

    def loss(self, role: Role) -> float | None:
        """Per token; None where it was not measured."""
        return sum(self.nll[role]) / sum(self.tokens) if role in self.nll and self.tokens else None

    def above_base(self, role: Role) -> float | None:
        """How far its loss lies above the base's; None where either was not measured.

        On answers that were drawn from the base this estimates the KL divergence from it, per token: the expectation
        of log p_base - log p over what the base says.
        """
        ours, base = self.loss(role), self.loss("base")
        return None if ours is None or base is None else ours - base


class PairedDifference(Part):
    """How much better the candidate is than another model on the same records; positive is better."""

    metric: str
    difference: float
    ci95: tuple[float, float] | None = None
    """The ends of the 95 % interval of the difference; None where the records set it no bound."""
    records: int


class Evaluation(Record):
    """Base, champion where there is one, and candidate on the same held-out records."""

    FILE: ClassVar[str] = "evaluation.json"

    run_id: str
    dataset_id: str = ""
    dataset_uri: str = ""
    records: int
    held_out: int | None = None
    """How many records the dataset holds out to decide on; `records` of them were used."""
    test_set: tuple[str, ...] = ()
    """Short hashes of some of the records, by which a test set is known again after a refresh."""
    fold: int | None = None
    """Which part of the held-out records this is, counted from 1; None where they are not divided."""
    folds: int = 1
    records_sha256: str = ""
    """Of evaluation_records.parquet, which says record by record what this one says in sum."""
    base: dict[str, Any] = {}
    """Reference and identity of the base model."""
    models: dict[str, Measured | None]
    """By role."""
    general_text: TextLosses | None = None
    """None where it was not measured."""
    suites: tuple[Suite, ...] = ()
    """Of questions outside the domain; none where none were asked for."""
    own_answers: TextLosses | None = None
    """Of what the base says to prompts of no domain; None where it was not asked."""
    harness: HarnessScores | None = None
    """Of tasks of lm-evaluation-harness; None where none were asked for."""
    probes: dict[str, Any] = {}
    """What further probes recorded, by their names."""
    changed_answers: float | None = None
    """Share of the records to which the candidate gives another answer than the champion; None where there is none."""
    paired: dict[str, PairedDifference | None] = {}
    """The candidate against each other role."""
    confusion: dict[str, Any] | None = None
    """Labels, and counts[reference][answer]; None where the answers are no classes."""
    samples: list[dict[str, Any]] = []
    """Prompt (its text, or the turns of a conversation), reference and each role's answer."""
    generation: dict[str, Any] = {}
    matmul_dtype: str | None = None
    first_scored_at: str = ""
    """When the first records had been scored; ISO 8601, with its zone."""
    seconds: dict[str, float] = {}

    def model(self, role: Role) -> Measured | None:
        """What was measured of a role; None where there is no such model."""
        return self.models.get(role)

    def metric(self, role: Role, key: str) -> float | None:
        """One number; None where it was not measured or is not finite."""
        measured = self.model(role)
        return finite(measured.metrics.get(key)) if measured else None


class SliceResult(Part):
    """How much better the candidate is than another model on one kind of record."""

    kind: str
    name: str
    records: int
    gain: float
    lower: float | None
    """The gain is at least this, at the rule's confidence; None where the records set it no bound."""
    upper: float | None
    worse: bool
    """Shown to be worse by more than is allowed."""


class Lead(Part):
    """How far the champion stood above what other candidates had on the records that chose it."""

    gain: float
    """Above the line through all of them, in the metric's unit; positive is better."""
    variance: float
    """Of all candidates around that line."""
    decisions: int
    """How many candidates there were."""


class RuleResult(Part):
    """One rule of the gate as it was applied, with its wording."""

    name: str
    field: str
    """The config field that sets the bound."""
    title: str = ""
    """What the rule asks for, in a few words."""
    metric: str | None = None
    against: Role | None = None
    """The model that the candidate was compared with."""
    candidate: float | None = None
    other: float | None = None
    """The other model's number."""
    bound: float | None = None
    """As the config states it: a margin or a limit."""
    bound_text: str = ""
    line: float | None = None
    """Where the bound lies on the metric's own axis: what the candidate had to reach."""
    line_text: str = ""
    gain: float | None = None
    """How much better the candidate is than the other model."""
    lower: float | None = None
    """The gain is at least this, at `confidence`."""
    upper: float | None = None
    """The gain is at most this, at `confidence`."""
    relative: bool = False
    """Whether gain and bounds are shares of the other model's number."""
    luck: float | None = None
    """How much of the champion's lead is taken for luck, in the unit of the gain, which may be lower by as much."""
    unseen: float | None = None
    """How much lower the gain is expected to be where the tail of the losses goes on beyond those drawn."""
    confidence: float | None = None
    passed: bool
    undecided: bool = False
    """Neither passed nor failed: the records do not decide it."""
    needs_approval: bool = False
    """Whether it is a person who lets it pass."""
    records_needed: int | None = None
    """Of an undecided rule, how many records would decide it; None where no number is worth naming."""
    slices: tuple[SliceResult, ...] = ()
    """Of the rule that judges them, those that were judged, the worst first."""
    text: str
    """A few sentences for people."""

    @property
    def short(self) -> str:
        """How it went, in a word or two."""
        if self.passed:
            return "passed"
        return "cannot tell" if self.undecided else "needs approval" if self.needs_approval else "failed"


class Decision(Record):
    """Whether the candidate may take the alias. Holding and skipping are outcomes, not errors."""

    FILE: ClassVar[str] = "decision.json"

    decision: Outcome
    verdict: Verdict | None = None
    """What the gate could say. Where it cannot tell, or a person has to approve, the candidate is held. None of a
    skipped run."""
    adapter: str
    alias: str
    run_id: str
    reasons: tuple[str, ...]
    """The sentences of the rules that failed when held, or could not tell, of every rule when promoted; of a skipped
    run why it was."""
    rules: tuple[RuleResult, ...] = ()
    version: str | None = None
    """None of a skipped run, which made none."""
    version_uri: str | None = None
    champion: str | None = None
    """Who held the alias when the candidate was compared."""
    anchor: str | None = None
    """The best version so far, once this decision is carried out; later candidates are held to it too."""
    look: int | None = None
    """How often the alias was decided on by this test set, this time included."""
    passed_before: int = 0
    """How many of those put one version in the place of another; 0 in decisions of before it was counted."""
    lead: Lead | None = None
    """The champion's, among earlier decisions on these records; None where they did not choose it, or are few."""
    test_set: tuple[str, ...] = ()
    """As the evaluation has it."""
    evaluation_sha256: str = ""
    """Of the evaluation that was decided on, as it was written; empty of a skipped run."""
    policy: dict[str, Any] = {}
    """The config's section `gate`."""
    basis_sha256: str = ""
    """Of all that the verdict follows from, and the verdict: equal where a decision is repeated on the same."""
    since_run: str | None = None
    """Of a skipped run, the one that consumed the data before."""

    @property
    def promoted(self) -> bool:
        return self.decision == "promote"

    @property
    def waits(self) -> bool:
        """Whether a person's approval is all that it lacks."""
        return self.verdict == "needs approval"

    @property
    def changes_nothing(self) -> bool:
        """Whether the candidate is the version that held the alias already, so that there was nothing to decide."""
        return self.version is not None and self.version == self.champion


def finite(value: object) -> float | None:
    """The value as a float, or None when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
