"""Records that the steps of a run leave for each other, as frozen types; `runs` defines where each is stored.

Reading is tolerant: keys that this release does not know stay in the record. `format` rises only when an older reader
would misunderstand a record, which it then refuses.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from components.shared.errors import IntegrityError
from components.shared.metrics import is_metric, metric_of
from components.shared.protocol import counted
from components.store.store import decode_json, encode_json


class Part(BaseModel):
    """A part of a record: frozen, and open to keys that later releases add."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="null")


Role = Literal["base", "champion", "candidate", "anchor"]
ROLES: tuple[Role, ...] = ("base", "champion", "candidate")
"""The models of every comparison. The anchor, the best version so far, is added if it is not the champion."""
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
        """Parse a record. Raises IntegrityError if the body is not JSON, lacks a key, has a key of the wrong type, or
        has a later format."""
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
        """SHA-256 of the record as it is written, in hex."""
        return hashlib.sha256(self.as_json()).hexdigest()


class Usage(Part):
    """Resources used by the job that took the last step, unless a field says otherwise; None means unknown."""

    workers: int
    gpu: str
    """GPU model of each worker; empty if they had no GPU."""
    held_s: float
    """Seconds from the start of the job to the last step, summed over the workers."""
    in_steps_s: float
    """Seconds spent in the whole training's steps, summed over the workers, without steps that were lost."""
    tokens: int
    restarts: int
    """How often workers restarted after steps had been taken; like `steps_repeated`, over the whole training."""
    steps_repeated: int
    flops: float | None
    """Operations of forward and backward passes, including recomputed ones, by the plan's count per token."""
    flops_with_parents: float | None
    """With those of the versions that the training went on from."""
    s3_requests: int
    """S3 requests of the workers that took the last step, without the driver's; the same holds for the bytes below."""
    s3_read_bytes: int
    s3_written_bytes: int
    price: float | None
    """US dollars for `held_s`; None without GPUs, or if the GPUs have no price."""
    price_source: str

    @property
    def hours(self) -> float:
        return self.held_s / 3600


class TaskScore(Part):
    """One metric of one task, or of a group of tasks, for one model."""

    task: str
    metric: str
    value: float | None
    """The metric's value; None if it is not a finite number."""
    stderr: float | None = None
    lower_is_better: bool = False
    passes: tuple[bool, ...] = ()
    """Whether each document is right; empty where the metric is none of right and wrong, as of a group of tasks."""


class HarnessScores(Part):
    """Scores of all tasks that a run asked for."""

    lm_eval: str
    """Version of lm-evaluation-harness that ran; it also fixes the tasks that it ships, and their versions."""
    tasks: tuple[str, ...]
    limit: int | None = None
    include_sha256: str = ""
    """SHA-256 of the folder of custom tasks (`evaluate.lm_eval_include`); empty if there is none."""
    base_format: str = ""
    """Number format of the base's weights: bf16, nf4 or int8."""
    left_out: str = ""
    scores: dict[str, tuple[TaskScore, ...]] = {}
    """Scores by role; roles on another base than the candidate's are left out."""

    def same_tasks(self, other: "HarnessScores") -> bool:
        """Whether these scores and the other's are comparable: same harness version, tasks, limit and custom tasks."""
        compared = ("lm_eval", "tasks", "limit", "include_sha256")
        return all(getattr(self, name) == getattr(other, name) for name in compared)

    def score(self, role: str, task: str, metric: str) -> TaskScore | None:
        return next(
            (score for score in self.scores.get(role, ()) if (score.task, score.metric) == (task, metric)), None
        )

    def main(self, role: str, task: str) -> TaskScore | None:
        scores = (score for score in self.scores.get(role, ()) if score.task == task and score.value is not None)
        return next(scores, None)

    @property
    def rows(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((score.task, score.metric) for scores in self.scores.values() for score in scores))

    @property
    def summary(self) -> list[str]:
        """One line for each task or group in the config, or for everything measured if the config names tags."""
        if self.left_out:
            return [f"lm-eval: left out, {self.left_out}"]
        by_task: dict[str, list[str]] = {}
        for task, metric in self.rows:
            scores = [f"{role} {score_text(self.score(role, task, metric))}" for role in self.scores]
            by_task.setdefault(task, []).append(f"{metric} {', '.join(scores)}")
        shown = self.tasks if set(self.tasks) <= by_task.keys() else by_task
        return [f"lm-eval {task}: {', '.join(by_task[task])}" for task in shown]


def score_text(score: TaskScore | None) -> str:
    """The score with its standard error; a dash if there is no value."""
    if score is None or score.value is None:
        return "–"  # noqa: RUF001 - a dash for a number that is not there
    return f"{score.value:.4g}" + (f" ± {score.stderr:.2g}" if score.stderr is not None else "")


class Prepared(Record):
    """What the Ray job that prepared a run's data leaves for the step that waits for it."""

    FILE: ClassVar[str] = "prepared.json"

    result: dict[str, Any]


_LEFT_OUT = {
    "personal_data": "with personal data",
    "duplicate": "repeated",
    "superseded_by_same_id": "replaced by a later row of their id",
    "over_max_rows_per_rater": "beyond data.max_rows_per_rater",
    "own_words_or_session_beside_eval": "a model's own words, or of a session, beside what is held out",
    "prompt_in_eval": "with a held-out prompt",
    "near_duplicate_of_eval": "near what is held out",
    "before_window": "before the window",
    "over_max_records": "beyond data.max_records",
}


def left_out_text(name: str) -> str:
    """What rows are that the profile of a dataset counts as dropped by this name."""
    return _LEFT_OUT.get(name, name.replace("_", " "))


class StepRecord(Record):
    """How one step went."""

    FILE: ClassVar[str] = "steps/<step>.json"

    step: str
    status: Status
    started_at: str
    seconds: float
    result: dict[str, Any] = {}

    @property
    def succeeded(self) -> bool:
        return self.status == "succeeded"

    @property
    def moved_alias(self) -> bool:
        """Whether the step promoted, even if it failed afterwards."""
        return self.step == "promote" and (self.succeeded or "event_uri" in self.result)


class Took(Part):
    """One part of a waiting time."""

    part: str
    seconds: float


class TrainResult(Record):
    """What the training published."""

    FILE: ClassVar[str] = "finetune.json"

    version: str
    version_uri: str
    manifest_sha256: str = ""
    dataset_uri: str = ""
    train_seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None
    eval_loss: float | None = None
    """Held-out loss of the published weights, on the records that the training looks at."""
    stopped_early: bool = False
    resumed_from_step: int | None = None
    trained_at: str = ""
    """When the last step ended, before anything was published; ISO 8601, with time zone."""
    began_at: str = ""
    until_first_step: list[Took] = []
    """Parts of the time from `began_at` to the first training step, in order."""
    usage: Usage | None = None


class Measured(Part):
    """One model of a comparison."""

    version: str | None = None
    metrics: dict[str, float | None]
    """Value of each metric, by its key in `METRICS`; None if it was not measured."""


class TextLosses(Part):
    """Losses of each model on texts other than held-out records: general text, or the base's own answers."""

    text_sha256: str
    """SHA-256 of the texts, as tokenized by the base's tokenizer."""
    base_format: str = ""
    """Number format of the base's weights: bf16, nf4 or int8."""
    tokens: list[int]
    nll: dict[Role, list[float]]
    """-log p of each text, in nats, by role; roles on another base than the candidate's are left out."""
    asked_sha256: str | None = None
    """SHA-256 of the base's prompts and of how its answers were sampled; None if the texts are not answers."""
    answers: list[list[int]] | None = None

    def loss(self, role: Role) -> float | None:
        return sum(self.nll[role]) / sum(self.tokens) if role in self.nll and self.tokens else None

    def above_base(self, role: Role) -> float | None:
        """Return how far the role's loss lies above the base's; None if either was not measured.

        On answers sampled from the base this estimates the KL divergence from it, per token: the expectation of
        log p_base - log p over the base's answers.
        """
        ours, base = self.loss(role), self.loss("base")
        return None if ours is None or base is None else ours - base


class PairedDifference(Part):
    """How much better the candidate is than another model on the same records; positive is better."""

    metric: str
    difference: float
    ci95: tuple[float, float] | None = None
    """Ends of the 95 % confidence interval of the difference; None if the records do not bound it."""
    records: int


class Evaluation(Record):
    """Comparison of base, champion (if there is one) and candidate on the same held-out records."""

    FILE: ClassVar[str] = "evaluation.json"

    run_id: str
    dataset_id: str = ""
    dataset_uri: str = ""
    records: int
    held_out: int | None = None
    """Number of records that the dataset holds out for decisions; `records` of them were used."""
    test_set: tuple[str, ...] = ()
    """Short hashes of some of the records; they identify the test set after its data are refreshed."""
    records_sha256: str = ""
    """SHA-256 of evaluation_records.parquet, which holds record by record what this record sums up."""
    base: dict[str, Any] = {}
    models: dict[str, Measured | None]
    general_text: TextLosses | None = None
    own_answers: TextLosses | None = None
    """Losses on the base's answers to prompts of no domain; None if the base was not asked."""
    harness: HarnessScores | None = None
    probes: dict[str, Any] = {}
    changed_answers: float | None = None
    """Share of the records on which candidate and champion answer differently; None if there is no champion."""
    paired: dict[str, PairedDifference | None] = {}
    since_champion: dict[Literal["new", "seen"], list[PairedDifference]] = {}
    """Candidate and champion on the records that the champion's run had not read, and on those that it had, in the
    gate's metric and in exact match; without an interval for fewer than gate.min_records. Empty where all are alike."""
    confusion: dict[str, Any] | None = None
    """Confusion matrix: labels, and counts[reference][answer]; None if the answers are not classes."""
    samples: list[dict[str, Any]] = []
    """Samples: prompt (its text, or the turns of a conversation), reference and each role's answer."""
    generation: dict[str, Any] = {}
    matmul_dtype: str | None = None
    first_scored_at: str = ""
    """When the first records had been scored; ISO 8601, with time zone."""
    seconds: dict[str, float] = {}

    def model(self, role: Role) -> Measured | None:
        return self.models.get(role)

    @property
    def freshness(self) -> list[str]:
        """What `since_champion` says, a line for each kind of record."""
        lines = []
        for which, paired in self.since_champion.items():
            if parts := [(metric_of(gain.metric), gain.difference) for gain in paired if is_metric(gain.metric)]:
                gains = ", ".join(f"{metric.label} {metric.gain_text(gain)}" for metric, gain in parts)
                kind = "new to the champion" if which == "new" else "that it knew"
                lines.append(f"{counted(paired[0].records, 'record')} {kind}: {gains}")
        return lines

    def metric(self, role: Role, key: str) -> float | None:
        measured = self.model(role)
        return finite(measured.metrics.get(key)) if measured else None


class SliceResult(Part):
    """How much better the candidate is than another model on one slice of the records."""

    kind: str
    name: str
    records: int
    gain: float
    lower: float | None
    """Lower bound of the gain, at the rule's confidence; None if the records do not bound it."""
    upper: float | None
    worse: bool


class Lead(Part):
    """How far the champion stood above other candidates on the records by which it was chosen."""

    gain: float
    """Distance of the champion above the line through all candidates, in the metric's unit; positive is better."""
    variance: float
    """Variance of all candidates around that line."""
    decisions: int


class RuleResult(Part):
    """One rule of the gate as it was applied, with its wording."""

    name: str
    field: str
    """The config field that sets the bound."""
    title: str = ""
    metric: str | None = None
    against: Role | None = None
    candidate: float | None = None
    other: float | None = None
    bound: float | None = None
    """The bound as stated in the config: a margin or a limit."""
    bound_text: str = ""
    line: float | None = None
    """The bound as a value of the metric: what the candidate had to reach."""
    line_text: str = ""
    gain: float | None = None
    lower: float | None = None
    """The gain is at least this, at `confidence`."""
    upper: float | None = None
    """The gain is at most this, at `confidence`."""
    relative: bool = False
    """Whether gain and bounds are shares of the other model's number."""
    luck: float | None = None
    """Part of the champion's lead attributed to luck, in the gain's unit; the gain may be lower by this much."""
    unseen: float | None = None
    """How much lower the gain is expected to be if the tail of the losses extends beyond the records drawn."""
    confidence: float | None = None
    passed: bool
    undecided: bool = False
    """Whether the rule neither passed nor failed, because the records do not decide it."""
    needs_approval: bool = False
    records_needed: int | None = None
    """How many records would decide an undecided rule; None if no useful number is known."""
    slices: tuple[SliceResult, ...] = ()
    """The slices that the rule judged, the worst first; empty for a rule that judges none."""
    text: str

    @property
    def short(self) -> str:
        if self.passed:
            return "passed"
        return "cannot tell" if self.undecided else "needs approval" if self.needs_approval else "failed"


class Decision(Record):
    """Whether the candidate may take the alias. Holding and skipping are outcomes, not errors."""

    FILE: ClassVar[str] = "decision.json"

    decision: Outcome
    verdict: Verdict | None = None
    """The gate's verdict. If it cannot tell, or a person has to approve, the candidate is held. None for a skipped
    run."""
    adapter: str
    alias: str
    run_id: str
    reasons: tuple[str, ...]
    """If held, the sentences of the rules that failed or could not tell; if promoted, those of every rule; for a
    skipped run, why it was skipped."""
    rules: tuple[RuleResult, ...] = ()
    version: str | None = None
    version_uri: str | None = None
    champion: str | None = None
    """The version that held the alias when the candidate was compared."""
    anchor: str | None = None
    """The best version so far, once this decision is carried out; later candidates are compared with it too."""
    look: int | None = None
    """How often the alias was decided on by this test set, including this decision."""
    passed_before: int = 0
    """How many earlier decisions replaced one version by another; 0 in decisions made before this was counted."""
    lead: Lead | None = None
    """The champion's lead in earlier decisions on these records; None if they did not choose it, or are too few."""
    test_set: tuple[str, ...] = ()
    """Same as `Evaluation.test_set`."""
    evaluation_sha256: str = ""
    """SHA-256 of the evaluation that was decided on, as it was written; empty for a skipped run."""
    policy: dict[str, Any] = {}
    revision: int = 0
    """Number of the gate's rules on rare losses; 0 in decisions made before this was counted."""
    basis_sha256: str = ""
    """SHA-256 of the verdict and everything that it follows from; repeating a decision gives the same value."""
    since_run: str | None = None

    @property
    def promoted(self) -> bool:
        return self.decision == "promote"

    @property
    def waits(self) -> bool:
        """Whether only a person's approval is missing."""
        return self.verdict == "needs approval"

    @property
    def changes_nothing(self) -> bool:
        """Whether the candidate already held the alias, so that there was nothing to decide."""
        return self.version is not None and self.version == self.champion


def finite(value: object) -> float | None:
    """Return the value as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record of metrics.jsonl, such as train/loss and eval/loss."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "step") and isinstance(value, (int, float)) and math.isfinite(value)
    }
