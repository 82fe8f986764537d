"""The config's `data`, `train` and `tune` sections: what is trained on, and how."""

import math
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from components.config.gate import AnswerMetric
from components.config.methods import MethodName
from components.config.section import Added, Section

# Where the data come from, what of them is held out, and what is left out.


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
    feedback: Annotated[str | list[str], Added("0.2.0")] = []
    """What people said of the logged answers in data.source: files as there, with rows of {response_id, score or label
    or edited or outcome, rater, time}. See data.md."""
    feedback_key: Annotated[str, Added("0.2.0")] = ""
    """Column with a key of your own, such as a case's number, by which feedback is joined as well as by response_id."""
    feedback_good: Annotated[float | None, Added("0.2.0")] = None
    """Smallest score of a good answer. Unset: scores are from -1 to 1, and good above 0.5."""
    whole_log: Annotated[bool, Added("0.2.0")] = False
    """Say that data.source holds every answer that was given, and not an export of those that drew feedback. Then a
    file of which every answer is rated good, edited or labelled may judge, as an audit may."""
    max_rows_per_rater: Annotated[Annotated[int, Field(ge=0)], Added("0.2.0")] = 100
    """Most records that one rater's feedback makes, so that nobody alone turns the adapter; 0 bounds none. What an
    audit drew is not bounded."""
    near_duplicates: Annotated[Annotated[float, Field(ge=0, le=1)], Added("0.2.0")] = 0.8
    """Leave out training records whose prompt is at least this similar to a held-out one: Jaccard similarity of
    five-character shingles, without case and punctuation, both of the whole prompts and of what is left of them without
    the text that many prompts share. 0 leaves none out."""
    max_reject_share: Share = 0.05
    """Stop when more than this share of rows is unusable. Up to it, bad rows go to rejects.parquet. It also bounds the
    records whose answers, and those whose prompts, are too long for model.max_length, and the training records that are
    left out as near-duplicates of held-out ones."""
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
    """Metric that decides whether an answer of production is right: from 0.5 on it is used."""
    engine: Annotated[Literal["local", "ray"], Added("0.2.0")] = "local"
    """Where the data are prepared: in the step's process, or by a job on the Ray cluster's CPUs, before a GPU is
    requested. On Kubernetes it has as many pods as the training, 2 to 8, of 4 CPU cores and 16 GiB each."""
    memory_gib: Annotated[Annotated[float, Field(ge=0.5)], Added("0.2.0")] = 2
    """Approximate memory in GiB for preparing the data; what does not fit is kept on disk."""

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


# The optimisation, and what of it lies where.

StartFrom = Annotated[str, StringConstraints(pattern=r"^(base|production|[a-z0-9][a-z0-9._-]*@[a-z0-9][a-z0-9._-]*)$")]
Dtype = Literal["auto", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
SHARING = {
    "micro_batch_size",
    "max_tokens",
    "zero_stage",
    "cpu_offload",
    "gradient_checkpointing",
    "activation_offloading",
    "checkpoint_every_steps",
    "keep_checkpoints",
}
"""Keys that say how the work of a step is shared out, what lies where, and what is kept of it: not what it computes."""


class TrainConfig(Section):
    """The optimisation."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak rate, reached after the warm-up, then a cosine to zero. The setting that matters most: tune it first.
    Absent means the method's own: 2e-4 for LoRA, and for the others relative to it."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training split."""
    start_from: Annotated[StartFrom, Added("0.2.0")] = "base"
    """base starts from the base model. production continues from the version that adapter.alias points at, or from the
    base if there is none; NAME@VERSION continues from that version. It must have the same base, method, rank and
    layers."""
    start_share: Annotated[Annotated[float, Field(ge=0, lt=1)], Added("0.2.0")] = 0
    """Share of start_from's weights in the published ones; the rest is what was trained from there (WiSE-FT,
    arXiv:2109.01903). 0.5 publishes half the step, so that two trainings of one recipe are half as far apart."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many optimizer steps, with the schedule fitted to them; 0 means epochs decide."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Records in one optimizer step, over all workers. Independent of how many workers share it."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 8
    """Records in one forward pass of one worker. batch_size must be a multiple of it times ray.num_workers."""
    max_tokens: Annotated[Annotated[int, Field(ge=0)], Added("0.2.0")] = 0
    """Tokens in one forward pass of one worker, padding included, instead of micro_batch_size: as many records as
    fit, at least one. Use it where records differ much in length. 0 uses micro_batch_size."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from zero."""
    dtype: Annotated[Dtype, Added("0.2.0")] = "auto"
    """dtype of weights, activations and gradients. auto is bfloat16, and on GPUs without it, such as T4, float16
    with loss scaling."""
    optimizer: Annotated[Optimizer, Added("0.2.0")] = "adamw"
    """adamw is PyTorch's. adamw_8bit keeps the two moments in 8 bits (bitsandbytes), for half of the optimizer's
    memory. paged_adamw_8bit also lets them be paged out to host memory."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, of all adapter weights but DoRA's magnitudes; 0 is none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the adapter's initial weights, the order of records and dropout."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimizer's state over the workers, 2 also the gradients, 3 also the base."""
    cpu_offload: bool = False
    """Keep the optimizer's state in host memory, and with zero_stage 3 the base too: slower, less GPU memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: Annotated[bool, Added("0.2.0")] = False
    """Keep the checkpointed activations, the input of each layer, in host memory: less GPU memory for long records,
    for a copy to the host and back in each step."""
    evals_per_epoch: Annotated[int, Field(ge=0)] = 4
    """How often the loss on held-out records is measured; 0 means only at the end."""
    eval_records: Annotated[int, Field(ge=1)] = 128
    """Validation records that this loss is measured on, the first of those that data.validation_share sets aside.
    The checkpoint is chosen on them; evaluation uses others."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 3
    """Stop after this many measurements in a row without a better loss, keeping the best; 0 never stops early."""
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 100
    """Steps between resumable checkpoints; 0 writes none."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "TrainConfig":
        if self.start_share and self.start_from == "base":
            raise ValueError(
                f"start_share {self.start_share:g} keeps some of what the training starts from, and that is the base: "
                "set train.start_from=production, or remove train.start_share"
            )
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offloading moves what gradient_checkpointing keeps: set train.gradient_checkpointing=true, "
                "or remove train.activation_offloading"
            )
        return self

    def require_even_shares(self, num_workers: int) -> None:
        """Refuse a batch that cannot be divided evenly over this many workers. Raises ValueError: the batch cannot be
        divided; the message names values that can."""
        step, factors = num_workers, f"ray.num_workers {num_workers}"
        if not self.max_tokens:
            step *= self.micro_batch_size
            factors = f"train.micro_batch_size {self.micro_batch_size} x {factors}"
        if self.batch_size % step:
            per_worker, left_over = divmod(self.batch_size, num_workers)
            smaller = math.gcd(per_worker, self.micro_batch_size)
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of {factors}: "
                f"try train.batch_size={max(step, self.batch_size // step * step)}"
                + ("" if left_over else f", or train.micro_batch_size={smaller}, which leaves every step as it is")
            )


# When a run sweeps learning rates by itself, and which it tries.

Rate = Annotated[float, Field(gt=0, lt=1)]
When = Literal["never", "always", "no_prior_sweep", "data_changed"]


class TuneConfig(Section):
    """How learning rates are swept. Every trial is a training, judged on the records that checkpoints are chosen on."""

    when: When = "never"
    """When a run of the pipeline sweeps before it trains: never, so that it trains at the config's rate; always;
    no_prior_sweep, if none is stored for this adapter, base, method and data source; data_changed, if none is stored
    for this very dataset. Unless it is never, the run trains at the rate that was found, now or before."""
    methods: list[MethodName] = []
    """Methods to compare, each at its own best rate; empty sweeps method.name alone."""
    learning_rates: list[Rate] = []
    """Rates to try, exactly these; empty makes a grid around the current rate."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 1
    """Trainings at each rate, with different seeds; their mean loss counts."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a trial, with the schedule fitted to them; 0 trains as long as a run does."""
