"""Whether a training fits into memory, and which settings would: a rehearsed plan against the available memory."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.config.methods import OWN_BASE, BaseFormat, refusals, setting
from components.config.ray import GPUS, Gpu
from components.config.schema import RunConfig
from components.shared.errors import ConfigError, UserError
from components.shared.machine import machine_bytes
from ray_jobs.adapters import own_base
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.base.local_cache import local_path
from ray_jobs.planning.memory import (
    BF16,
    FLOAT32,
    GIB,
    MARGIN,
    Layout,
    Parts,
    Reading,
    flops_per_token,
    parts_text,
    plan,
    reading,
    weight_bytes,
)
from ray_jobs.planning.rehearsal import CannotRehearse, ModelStats, Rehearsal, StepMemory, rehearsing
from ray_jobs.text.batching import Lengths
from ray_jobs.training.step_zero import TOKENS as PROBE_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# How much disk a pod needs: Kubernetes evicts a pod that writes more than `ray.cluster.disk_gib`.

OPTIMIZER = 12  # bytes per trained parameter in a checkpoint: float32 master weight and moments
FOUR_BITS = 0.6
"""Bytes per parameter, scales included, of a base that the run makes (OWN_BASE), if all of it were quantised."""


def disk_bytes(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> int | None:
    """Disk that a pod needs, the larger of home (the base) and /tmp (a checkpoint of the pod's workers); None where no
    pod is created, or the base is stored quantised."""
    cluster = config.ray.cluster
    if cluster.disk_gib is None or getattr(base, "quantization_config", None):
        return None
    per_weight = getattr(base.dtype, "itemsize", BF16) + FOUR_BITS * (config.method.row.init in OWN_BASE)
    parts = 1 if config.train.zero_stage else config.ray.max_workers // cluster.pods(config.ray.max_workers)
    return max(round(per_weight * stats.parameters), OPTIMIZER * stats.trainable * parts)


# How long it takes until the first step, by what is read of the base. Bytes a second of a network of 10 Gbit/s, and of
# an NVMe disk; operations a second, and weights a second to NF4 and back, of one core (AMD EPYC with AVX-512).
NETWORK, DISK, CORE, QUANTISED = 1.25e9, 2e9, 8e10, 2e8


def start(config: RunConfig, base: "PretrainedConfig", stats: ModelStats) -> dict[str, Any] | None:
    """Bytes that each node fetches and reads, and the seconds of each part of a start: workers wait for the slowest
    node, and at ZeRO-3 for the first check of rank 0 (`step_zero`). None for a base that is stored quantised."""
    if getattr(base, "quantization_config", None):
        return None
    stored = getattr(base.dtype, "itemsize", BF16) * stats.parameters
    is_here = local_path(config.model.base) is not None
    seconds = {"fetch": 0.0 if is_here else stored / NETWORK, "load": stored / DISK}
    if config.train.zero_stage == 3:
        workers, cluster = config.ray.max_workers, config.ray.cluster
        nodes = 1 if cluster.disk_gib is None else cluster.pods(workers)
        cores = config.ray.cpus_per_worker * workers // nodes
        weights = sum(outputs * inputs for outputs, inputs in stats.matrices)
        quantising = weights / QUANTISED * (config.method.row.base == "nf4")
        seconds["check"] = stored / DISK + (2 * stats.active * PROBE_TOKENS / CORE + quantising) / cores
    return {"node_bytes": stored, "seconds": seconds}


BASE_SHARE = 0.8
"""Share of one worker's memory that a base may take in evaluation; the rest is for the KV cache and activations."""
# Ray's accelerator names that differ from ours. For two sizes under one name the larger, so that nothing that would run
# is refused.
RAY_NAMES = {"A100": "A100-80G"}


@dataclass(frozen=True)
class Device:
    """The device that one worker trains on."""

    name: str
    memory: int | None  # bytes for one worker; None when unknown
    gpu: Gpu | None = None
    whole: int | None = None  # bytes that all CPU workers share; None for GPUs, or when unknown

    @property
    def safe(self) -> int | None:
        """Bytes that a plan may use: on a GPU less than all, since a plan may be too low and a GPU cannot swap."""
        if self.memory is None or self.whole is not None:
            return self.memory
        return int(self.memory / (1 + MARGIN))

    def holds(self, num_bytes: int) -> bool | None:
        """Whether a plan of `num_bytes` fits; None where the memory is unknown."""
        return None if self.safe is None else num_bytes <= self.safe


@dataclass(frozen=True)
class WorstBatch:
    """Upper bound of a training's micro-batches."""

    length: int  # tokens of its longest record
    answers: int  # labelled tokens per record: the mean over the records with the most of them

    @classmethod
    def planned(cls, config: RunConfig) -> "WorstBatch":
        """Records as long as the context, with answers of evaluate.max_new_tokens, or as long if that is unset."""
        length = config.model.max_length
        return cls(length, min(config.evaluate.max_new_tokens or length, length))

    @classmethod
    def of(cls, split: Lengths, micro_batch_size: int) -> "WorstBatch":
        """Of real records: the longest length, and the mean of the `micro_batch_size` longest answers."""
        longest = np.sort(split.num_answer_tokens)[-micro_batch_size:].tolist()
        return cls(int(split.lengths.max()), -(-sum(longest) // len(longest)))


@dataclass(frozen=True)
class Choice:
    """A config, and the memory that its training takes."""

    config: RunConfig
    parts: Parts
    dense_base: bool = False
    """Whether CPU workers dequantise the base once instead of for each product: the same steps in less time."""

    def settings(self) -> dict[str, Any]:
        train = self.config.train
        keys = ("zero_stage", "max_tokens", "micro_batch_size", "gradient_checkpointing", "activation_offloading")
        return {"method.base": self.config.method.row.base, **{f"train.{key}": getattr(train, key) for key in keys}}

    def changes(self, configured: "Choice") -> dict[str, Any]:
        before = configured.settings()
        return {key: value for key, value in self.settings().items() if value != before[key]}


def records_at_once(config: RunConfig, length: int) -> int:
    """Number of records in the largest forward pass of a training whose longest records have `length` tokens; with
    train.max_tokens those that reach it, rounded up, as a pass of shorter records comes closer to the limit."""
    train = config.train
    if not train.max_tokens:
        return train.micro_batch_size
    return min(-(-train.max_tokens // length), train.batch_size // config.ray.min_workers)


def named_device(config: RunConfig) -> Device:
    """The device by the config alone: the GPU that it names, or for CPU workers this machine."""
    if config.ray.use_gpu:
        return gpu_device(config.ray.gpu)
    return cpu_device("this machine", machine_bytes(), config.ray.max_workers)


def cluster_device(config: RunConfig, nodes: Iterable[Mapping[str, Any]]) -> Device:
    """The device of a Ray cluster's workers, from `ray.nodes()`; a GPU that the config names takes precedence."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if not config.ray.use_gpu:
        # A head node that runs no workers (num-cpus 0) adds no memory.
        workers = [node for node in resources if node.get("CPU")]
        memory = sum(node.get("memory", 0) + node.get("object_store_memory", 0) for node in workers)
        return cpu_device("this cluster", int(memory) or None, config.ray.max_workers)
    if config.ray.gpu:
        return gpu_device(config.ray.gpu)
    kinds = {key.partition(":")[2] for node in resources if node.get("GPU") for key in node if key.startswith("accel")}
    gpus = [RAY_NAMES.get(kind, kind) for kind in kinds]
    if not gpus or not set(gpus) <= GPUS.keys():
        return gpu_device(None)
    return gpu_device(max(gpus, key=lambda kind: GPUS[kind].memory_gib))


def gpu_device(name: str | None) -> Device:
    """A GPU from the table GPUS; with None, an unknown one."""
    if name is None:
        return Device("an unnamed GPU", None)
    return Device(name, int(GPUS[name].memory_gib * GIB), GPUS[name])


def cpu_device(name: str, memory: int | None, num_workers: int) -> Device:
    """One CPU worker's equal part of the memory that all workers share."""
    return Device(name, memory // num_workers if memory else None, whole=memory)


def settled(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, device: Device) -> Choice:
    """The memory plan on a device: CPU workers that each hold the whole base (below ZeRO-3) hold it dense if that
    leaves the margin that a plan leaves on GPUs."""
    if not (config.ray.use_gpu or config.train.zero_stage == 3 or device.memory is None):
        dense = chosen(config, rehearsal, batch, dense_base=True)
        if dense.parts.total * (1 + MARGIN) <= device.memory:
            return dense
    return chosen(config, rehearsal, batch)


def chosen(
    config: RunConfig,
    rehearsal: Rehearsal,
    batch: WorstBatch,
    step: StepMemory | None = None,
    *,
    dense_base: bool = False,
) -> Choice:
    """The memory plan of a config; `step` where already known."""
    train, records = config.train, records_at_once(config, batch.length)
    parts = plan(
        rehearsal.stats,
        step or step_of(config, rehearsal, batch),
        base=config.method.row.base,
        answers=batch.answers * records,
        layout=Layout(
            config.ray.min_workers,
            train.zero_stage,
            train.cpu_offload,
            optimizer=train.optimizer,
            dense_base=dense_base,
            activation_offloading=train.activation_offloading,
        ),
        use_gpu=config.ray.use_gpu,
    )
    return Choice(config, parts, dense_base)


def step_of(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch) -> StepMemory:
    """Memory of one worker's step."""
    train = config.train
    return rehearsal.step(
        records_at_once(config, batch.length),
        batch.length,
        checkpointing=train.gradient_checkpointing,
        sharded=train.zero_stage == 3,
    )


def advised(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, memory: int) -> Choice | None:
    """The first choice that fits: preferably the lowest ZeRO stage, then no gradient checkpointing, then the largest
    micro-batch; failing that, the same with activation offloading, and failing that on NF4."""
    for rough in _legal_choices(config, rehearsal, batch):
        if rough.parts.total <= memory:
            choice = chosen(rough.config, rehearsal, batch)
            if choice.parts.total <= memory:
                return choice
    return None


def must_be_shared(config: RunConfig, rehearsal: Rehearsal, device: Device) -> bool:
    """Whether the workers shard the base for inference as in training: one's memory is too small for it, or unknown."""
    if config.train.zero_stage < 3 or config.ray.max_workers == 1:
        return False
    whole = weight_bytes(rehearsal.stats, config.method.row.base, Layout(1, 0))
    return device.memory is None or whole > BASE_SHARE * device.memory


def require_fit(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, device: Device) -> Choice:
    """The plan of a training that may begin. Only what cannot run is refused: on a GPU, tensors that exceed its memory;
    on CPUs, which can swap and map files, one worker's `Parts.states` that exceed all the memory there is. Raises
    ConfigError: it cannot fit; the message names the parts, and settings that would fit."""
    choice = settled(config, rehearsal, batch, device)
    parts = choice.parts
    needed, limit = (parts.states, device.whole) if device.whole else (parts.total - parts.overhead, device.memory)
    if limit is None or needed <= limit:
        return choice
    if better := advised(config, rehearsal, batch, device.safe or limit):
        changes = " ".join(setting(key, value) for key, value in better.changes(choice).items())
        remedy = f"With {changes} it needs {better.parts.total / GIB:.1f} GiB"
    else:
        remedy = (
            "Take a smaller model.base, more workers (ray.num_workers) with train.zero_stage=3, or model.max_length "
            f"below {batch.length}"
        )
    raise ConfigError(
        f"this training does not fit on {device.name}: each worker needs {parts.total / GIB:.1f} GiB "
        f"({parts_text(parts)}) and has {(device.memory or limit) / GIB:.1f}. {remedy}"
    )


def evaluated(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, records: int | None = None) -> Reading:
    """Memory of the evaluation after the training, with `records` at once, evaluate.batch_size by default."""
    records = records or config.evaluate.batch_size
    return reading(
        rehearsal.stats,
        rehearsal.reading(records, batch.length),
        base=config.method.row.base,
        records=records,
        length=batch.length,
        answers=min(batch.answers, config.evaluate.max_new_tokens or batch.answers),
        use_gpu=config.ray.use_gpu,
    )


def records_to_evaluate(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, device: Device) -> int:
    """The largest evaluate.batch_size that fits, found by halving the config's; 0 where none does."""
    records = config.evaluate.batch_size
    while records and device.holds(evaluated(config, rehearsal, batch, records).total) is False:
        records //= 2
    return records


def _legal_choices(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch) -> Iterator[Choice]:
    per_worker = config.train.batch_size // config.ray.min_workers
    sizes = [size for size in range(per_worker, 0, -1) if per_worker % size == 0]
    bases: dict[BaseFormat, None] = dict.fromkeys((config.method.row.base, "nf4"))
    for base in (base for base in bases if base in rehearsal.formats):
        stages = range(3 if rehearsal.adapts_experts else 4)
        for offloading, zero_stage, checkpointing in product((False, True), stages, (False, True)):
            if offloading and not (checkpointing and config.ray.use_gpu):
                continue
            cell = replace(config.cell, base=base, zero_stage=zero_stage, gradient_checkpointing=checkpointing)
            if any(refusals(cell)):
                continue
            ends = [
                rehearsal.step(size, batch.length, checkpointing=checkpointing, sharded=zero_stage == 3)
                for size in (1, per_worker)
            ]
            for size in sizes:
                settings = {
                    "zero_stage": zero_stage,
                    "max_tokens": 0,
                    "micro_batch_size": size,
                    "gradient_checkpointing": checkpointing,
                    "activation_offloading": offloading,
                }
                method, train = (
                    config.method.model_copy(update={"base": base}),
                    config.train.model_copy(update=settings),
                )
                candidate = config.model_copy(update={"method": method, "train": train})
                # What is kept for the backward pass grows linearly with the micro-batch, the workspace at most so.
                share, (first, last) = (size - 1) / max(1, per_worker - 1), ends
                kept, workspace, inputs = (
                    int(getattr(first, part) + share * (getattr(last, part) - getattr(first, part)))
                    for part in ("kept", "workspace", "inputs")
                )
                yield chosen(candidate, rehearsal, batch, StepMemory(kept, workspace, first.is_estimate, inputs))


@dataclass(frozen=True)
class Outlook:
    """The plan of a training that may begin."""

    lines: list[str]  # lines to print before the training
    dense_base: bool = False  # whether workers hold the base dense, provided that memory is free for it when they start
    flops_per_token: float | None = None  # for the actual mean record; None for a base that cannot be planned for
    stored_bytes: int | None = None  # planned memory of one worker that reads the base as it is stored; None likewise


def before_training(
    config: RunConfig, base_folder: Path, split: Lengths, nodes: Iterable[Mapping[str, Any]]
) -> Outlook:
    """Plan the training for its real records before any worker trains; `nodes` is what `ray.nodes()` returns.
    Raises ConfigError: memory does not hold it, the adapter does not fit the base, or that is no causal model."""
    device = cluster_device(config, nodes)
    own_base.check(config, Base(config.model.base, base_folder, {}))
    try:
        with rehearsing():
            base = base_model.load_config(base_folder, config.model)
            rehearsal = Rehearsal.of(config, base)
    except CannotRehearse as exc:  # a training does not need a plan
        return Outlook([f"this base cannot be planned for, so its memory is unknown: {exc}"])
    if needed := disk_bytes(config, base, rehearsal.stats):
        config.ray.require_disk(config.model.base, needed)
    batch = WorstBatch.of(split, records_at_once(config, int(split.lengths.max())))
    choice = require_fit(config, rehearsal, batch, device)
    parts, is_dense = choice.parts, choice.dense_base
    counted = counts(rehearsal.stats)
    needs = f"each worker needs about {parts.total / GIB:.1f} GiB ({parts_text(parts)})"
    if is_dense:
        needs += ", the base held dense,"
    if device.memory is None:
        fits = "; the GPU's memory is unknown: name the GPU with ray.gpu"
    else:
        verdict = "fits" if device.holds(parts.total) else "may not fit"
        fits = f" of {device.memory / GIB:.1f} on {device.name}: {verdict}"
    lines = [
        f"{config.method.name} trains {counted['trainable_parameters']:,} parameters, "
        f"{counted['trainable_share']:.3%} of all, at a peak rate of {config.learning_rate:g}",
        needs + fits,
    ]
    layers, full = rehearsal.above_full_rank
    if layers:
        lines.append(
            f"method.rank {config.method.r} is above the full rank of {layers} layers, {full} and more: there the "
            "adapter has more weights than the update can use"
        )
    wanted, fitting = config.evaluate.batch_size, records_to_evaluate(config, rehearsal, batch, device)
    if fitting < wanted:
        whole = evaluated(config, rehearsal, batch).total / GIB
        lines.append(
            f"evaluating {wanted} records at once needs about {whole:.1f} GiB and may not fit: "
            + (f"set evaluate.batch_size={fitting}" if fitting else "the base alone takes more than one device has")
        )
    operations = flops_per_token(
        rehearsal.stats,
        length=round(split.lengths.mean()),
        answer_share=split.num_answer_tokens.sum() / split.lengths.sum(),
        checkpointing=config.train.gradient_checkpointing,
    )
    stored = chosen(config, rehearsal, batch).parts.total
    return Outlook(lines, is_dense, float(operations), stored)


def counts(stats: ModelStats) -> dict[str, Any]:
    """The trainable parameters, and their share of those of base and adapter together, as publications count it."""
    total = stats.parameters + stats.trainable + stats.frozen_adapter
    return {"trainable_parameters": stats.trainable, "trainable_share": stats.trainable / total}


def is_shared(config: RunConfig, base: "PretrainedConfig", nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the workers of an evaluation shard the base; one that cannot be planned for is, as in its training."""
    if config.train.zero_stage < 3:
        return False
    try:
        with rehearsing():
            rehearsal = Rehearsal(base, config.method, reference=config.model.base, use_gpu=config.ray.use_gpu)
    except (CannotRehearse, ConfigError):
        return True
    return must_be_shared(config, rehearsal, cluster_device(config, nodes))


def on_gpus(config: RunConfig, base: Base) -> bool:
    """Whether the machine's GPUs hold a version's base, with room for activations; also if it cannot be planned for."""
    import torch

    if not torch.cuda.is_available():
        return False
    free = sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    stats = _stats(config, base)
    return stats is None or weight_bytes(stats, config.method.row.base, Layout(1, 0)) <= BASE_SHARE * free


def require_float32(config: RunConfig, base: Base) -> None:
    """Raises UserError where a version's base in float32 needs more than the machine's memory."""
    stats, memory = _stats(config, base), machine_bytes()
    if stats and FLOAT32 * stats.parameters > memory:
        raise UserError(
            f"a version is written in another form in float32, in which {base.reference} takes "
            f"{FLOAT32 * stats.parameters / GIB:.0f} GiB, and this machine has {memory / GIB:.0f}: do it on one with "
            "more memory"
        )


def _stats(config: RunConfig, base: Base) -> ModelStats | None:
    """The base's statistics; None if it cannot be planned for, or not as another release trained on it."""
    try:
        shape = base_model.load_config(base.path, config.model)
        return Rehearsal(shape, config.method, reference=base.reference).stats
    except (ConfigError, RuntimeError, TypeError, ValueError, AttributeError):
        return None
