"""The last check before workers are started: the memory plan for the real records against the cluster's devices."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from ray_jobs.adapters import own_base
from ray_jobs.base import base_config
from ray_jobs.base.base_model import Base
from ray_jobs.planning.capacity import (
    Device,
    WorstBatch,
    chosen,
    cluster_device,
    evaluated,
    records_at_once,
    records_to_evaluate,
    require_fit,
)
from ray_jobs.planning.disk import require_disk
from ray_jobs.planning.memory import GIB, parts_text
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal
from ray_jobs.planning.rehearsing import CannotRehearse, rehearsing
from ray_jobs.planning.speed import flops_per_token
from ray_jobs.text.batching import Lengths


@dataclass(frozen=True)
class Outlook:
    """The plan of a training that may begin."""

    lines: list[str]
    """Lines to print before the training."""
    dense_base: bool = False
    """Whether workers hold the base dense, provided that memory is free for it when they start."""
    flops_per_token: float | None = None
    """Training FLOPs per token, for the actual mean record; None for a base that cannot be planned for."""


def before_training(
    config: RunConfig, base_folder: Path, split: Lengths, nodes: Iterable[Mapping[str, Any]]
) -> Outlook:
    """Plan the training before any worker is started; `nodes` is what `ray.nodes()` returns.

    Raises:
        ConfigError: the training does not fit into memory, the adapter does not fit the base, or the base is no causal
            language model.
    """
    device = cluster_device(config, nodes)
    own_base.check(config, Base(config.model.base, base_folder, {}))
    try:
        with rehearsing():
            base = base_config.load(base_folder, config.model)
            rehearsal = Rehearsal.of(config, base)
    except CannotRehearse as exc:  # a training does not need a plan
        return Outlook([f"this base cannot be planned for, so its memory is unknown: {exc}"])
    require_disk(config, base, rehearsal.stats)
    batch = _worst_batch(config, split)
    choice = require_fit(config, rehearsal, batch, device)
    parts, is_dense = choice.parts, bool(choice.config.train.dense_base)
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
        *_rank_lines(config, rehearsal),
        *_evaluation_lines(config, rehearsal, batch, device),
    ]
    operations = flops_per_token(
        rehearsal.stats,
        length=round(split.lengths.mean()),
        answer_share=split.num_answer_tokens.sum() / split.lengths.sum(),
        checkpointing=config.train.gradient_checkpointing,
    )
    return Outlook(lines, is_dense, float(operations))


def planned_bytes(config: RunConfig, base_folder: Path, split: Lengths) -> int | None:
    """Planned memory of one worker in bytes; None for a base that cannot be planned for."""
    try:
        with rehearsing():
            rehearsal = Rehearsal.of(config, base_config.load(base_folder, config.model))
    except (CannotRehearse, ConfigError):
        return None
    return round(chosen(config, rehearsal, _worst_batch(config, split)).parts.total)


def _worst_batch(config: RunConfig, split: Lengths) -> WorstBatch:
    return WorstBatch.of(split, records_at_once(config, int(split.lengths.max())))


def _rank_lines(config: RunConfig, rehearsal: Rehearsal) -> Iterator[str]:
    layers, full = rehearsal.above_full_rank
    if layers:
        yield (
            f"method.rank {config.method.r} is above the full rank of {layers} layers, {full} and more: there the "
            "adapter has more weights than the update can use"
        )


def _evaluation_lines(config: RunConfig, rehearsal: Rehearsal, batch: WorstBatch, device: Device) -> Iterator[str]:
    wanted, fitting = config.evaluate.batch_size, records_to_evaluate(config, rehearsal, batch, device)
    if fitting < wanted:
        needs = (
            f"evaluating {wanted} records at once needs about {evaluated(config, rehearsal, batch).total / GIB:.1f} GiB"
        )
        yield f"{needs} and may not fit: " + (
            f"set evaluate.batch_size={fitting}" if fitting else "the base alone takes more than one device has"
        )


def counts(stats: ModelStats) -> dict[str, Any]:
    """The number of trainable parameters, and their share of the parameters of base and adapter together, as
    publications count it."""
    total = stats.parameters + stats.trainable + stats.frozen_adapter
    return {"trainable_parameters": stats.trainable, "trainable_share": stats.trainable / total}
