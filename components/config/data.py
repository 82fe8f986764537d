"""Where the data come from, what of them is held out, and what is left out."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from components.config.gate import AnswerMetric
from components.config.section import Added, Section

# The config's words on which column of a row is which.


class ColumnsConfig(Section):
    """Columns of your rows that have names of their own. Unset, rows are known by their columns: see data.md."""

    prompt: str | list[str] = ""
    """Column of the prompt, or a list of columns whose texts are joined by a blank line; in a list, empty columns are
    skipped."""
    completion: str = ""
    """Column of the answer."""
    messages: str = ""
    """Column of a conversation, a list of {role, content} or of {from, value}."""
    system: str = ""
    """Column of a system message, which goes before the prompt or the conversation."""
    id: str = ""
    """Column of the record's id."""
    tools: str = ""
    """Column of the tools that may be called."""


LossOn = Literal["last", "all"]
Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Section):
    """Data source and validation."""

    source: str | list[str]
    """JSONL, JSON, CSV, TSV or Parquet, also packed by gzip or zstd: a path, a glob, a folder, s3://BUCKET/KEY,
    s3://BUCKET/FOLDER/, hf://ORG/NAME, or example://icd10. Or a list."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of records held out, chosen by a hash of each record's key, so that it never moves on a refresh."""
    validation_share: Annotated[float, Field(gt=0, lt=1), Added("0.2.0")] = 0.2
    """Share of the held-out records, by a hash of their ids, on which a training chooses its checkpoint and when to
    stop. The gate decides on the others, which nothing has used before."""
    group: Annotated[str, Added("0.2.0")] = ""
    """Column that names the group of a row, such as a patient or a document. Records of one group are held out
    together, and the gate counts them as one observation. Empty: no groups."""
    columns: Annotated[ColumnsConfig, Added("0.2.0")] = ColumnsConfig()
    near_duplicates: Annotated[Annotated[float, Field(ge=0, le=1)], Added("0.2.0")] = 0.8
    """Leave out training records whose prompt is at least this similar to a held-out one: Jaccard similarity of
    five-character shingles, without case and punctuation, both of the whole prompts and of what is left of them without
    the text that many prompts share. 0 leaves none out."""
    max_near_share: Annotated[Share, Added("0.2.0")] = 0.05
    """Stop if more than this share of the training records would be left out as near-duplicates of held-out ones."""
    max_reject_share: Share = 0.05
    """Stop when more than this share of rows is unusable. Up to it, bad rows go to rejects.parquet. It also bounds the
    records whose answers, and those whose prompts, are too long for model.max_length."""
    max_records: Annotated[int, Field(ge=0)] = 0
    """Use only this many records, taken in order of their key's hash; 0 uses all."""
    min_new_records: Annotated[int, Field(ge=0)] = 0
    """Skip a run when fewer records than this are new since the adapter's last run that ended in a decision. They are
    not lost: they count again next time. 0 never skips."""
    personal: Annotated[Literal["report", "mask", "drop"], Added("0.2.0")] = "report"
    """What happens to e-mail addresses, phone and card numbers, IBANs, keys and tokens in messages: report counts them
    in the profile, mask replaces them (such as by [EMAIL]) before anything is stored, drop leaves their records out."""
    phone_regions: Annotated[list[Annotated[str, StringConstraints(pattern="^[A-Z]{2}$")]], Added("0.2.0")] = []
    """Countries (such as DE) whose phone numbers count as personal data without their leading + as well."""
    personal_names: Annotated[bool, Added("0.2.0")] = False
    """Look for people's names as well, with Presidio's English model; needs the package presidio-analyzer."""
    loss_on: Annotated[LossOn, Added("0.2.0")] = "last"
    """Answers of a conversation to train on: the last, or all of the assistant's. Evaluation uses the last."""
    window_days: Annotated[float, Field(ge=0)] = 0
    """Train on files and objects from this many days before the newest one; 0 trains on all. Held-out records still
    come from all of them, so that forgetting shows."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0
    """Share of the training records to draw from before the window, against forgetting."""
    replay_from: Annotated[Literal["records", "production"], Added("0.2.0")] = "records"
    """Answers to train on for those earlier records: the records' own, or production's where they are right (on-policy
    replay, arXiv:2605.29495). Without a version in production, the records' own."""
    replay_metric: Annotated[AnswerMetric, Added("0.2.0")] = "exact_match"
    """Metric that decides whether an answer of production is right."""
    replay_least: Annotated[Annotated[float, Field(gt=0, le=1)], Added("0.2.0")] = 1
    """Smallest value of that metric at which an answer of production is used."""
    engine: Annotated[Literal["local", "ray"], Added("0.2.0")] = "local"
    """Where the data are prepared: in the step's process, or by a job on the Ray cluster's CPUs, before a GPU is
    requested."""
    memory_gib: Annotated[Annotated[float, Field(ge=0.5)], Added("0.2.0")] = 2
    """Approximate memory in GiB for preparing the data; what does not fit is kept on disk."""
    timeout_s: Annotated[int, Field(ge=60), Added("0.2.0")] = 3600
    """Deadline of the step that prepares the data, in a pipeline on Kubeflow, and of its Ray job."""

    @model_validator(mode="after")
    def _replay_needs_a_window(self) -> "DataConfig":
        if self.replay_share and not self.window_days:
            raise ValueError(
                f"replay_share {self.replay_share:g} draws from before the window, and there is none: "
                "set data.window_days, or remove data.replay_share"
            )
        if self.replay_from == "production" and not self.replay_share:
            raise ValueError(
                'replay_from "production" answers the records that replay_share draws, which is 0: '
                "set data.replay_share, or remove data.replay_from"
            )
        return self
