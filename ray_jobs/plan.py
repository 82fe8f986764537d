"""Estimate memory, speed and cost of a training before it is started: `python -m ray_jobs.plan --config FILE`.

Uses no GPU and needs no weights: only the base's configuration is read. The last line of stdout is one JSON object;
`fineloop plan` formats it for the terminal.
"""

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.config.methods import AXES, METHODS, MethodName, nearest_legal
from components.config.ray import FIRST_WITH_BFLOAT16, PRICED, dtype_on
from components.config.schema import MethodConfig, RunConfig, cautions
from components.shared import garbage
from components.shared.errors import ConfigError
from components.shared.protocol import say

with garbage.importing():
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.planning import bases, capacity
    from ray_jobs.planning.capacity import Device, WorstBatch
    from ray_jobs.planning.memory import BF16, GIB, MARGIN, Layout, Parts, plan, speed
    from ray_jobs.planning.rehearsal import ModelStats, Rehearsal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STEP = "plan"
MILLION = 1_000_000


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.plan", __doc__)
    parser.add_argument("--all-methods", action="store_true", help="one row for every method of the table as well")
    parser.add_argument("--bases", type=float, help="of which known bases would a GPU with so many GiB hold this")

    def job(config: RunConfig, arguments: argparse.Namespace) -> None:
        if arguments.bases:
            say(STEP, f"planning {len(bases.BASES)} bases of the hub")
            fitting = bases.fitting(config, Device("this GPU", int(arguments.bases * GIB)))
            print(json.dumps({"bases": list(fitting)}), flush=True)  # noqa: T201 - stdout is the answer
            return
        base = base_model.read_config(config.model)
        config = base_model.fitted(config, base, lambda line: say(STEP, line))
        for line in cautions(config):
            say(STEP, line)
        say(STEP, f"rehearsing a training step of {config.model.base}, without its weights")
        body = planned(config, base, capacity.named_device(config))
        if arguments.all_methods:
            say(STEP, f"the same for all {len(METHODS)} methods")
            body["methods"] = compared(config, base)
        print(json.dumps(body), flush=True)  # noqa: T201 - stdout is the answer

    entry.main(STEP, parser, job)


def planned(config: RunConfig, base: "PretrainedConfig", device: Device) -> dict[str, Any]:
    """The whole plan; memory in bytes per worker, times in seconds, money in US dollars. With elastic workers it is for
    the minimum number, where each holds the most."""
    rehearsal = Rehearsal.of(config, base)
    batch = WorstBatch.planned(config)
    choice = capacity.settled(config, rehearsal, batch, device)
    better = capacity.advised(config, rehearsal, batch, device.safe) if device.safe else None
    train, stats = config.train, rehearsal.stats
    fitting = capacity.records_to_evaluate(config, rehearsal, batch, device) if device.memory else None
    step, reading = capacity.step_of(config, rehearsal, batch), capacity.evaluated(config, rehearsal, batch)
    return {
        "method": config.method.name,
        **{axis: getattr(config.method.row, axis) for axis in AXES},
        "model": config.model.base,
        "rank": config.method.r,
        "learning_rate": config.learning_rate,
        "parameters": stats.parameters,
        **capacity.counts(stats),
        "memory_bytes": choice.parts.as_json(),
        "host_memory_bytes": choice.parts.host,
        "pod_memory_bytes": config.ray.cluster.worker_bytes(config.ray.max_workers),
        "disk_bytes": capacity.disk_bytes(config, base, stats),
        "start": capacity.start(config, base, stats),
        "expert_bytes": BF16 * stats.experts,
        "evaluation": {
            "memory_bytes": reading.as_json(),
            "batch_size": config.evaluate.batch_size,
            "fits": device.holds(reading.total),
            "fitting_batch_size": fitting,
        },
        "activations_are_rough": step.is_estimate,
        "zero_stage": train.zero_stage,
        "micro_batch_size": capacity.records_at_once(config, batch.length),
        "gradient_checkpointing": train.gradient_checkpointing,
        "activation_offloading": train.activation_offloading,
        "cpu_offload": train.cpu_offload,
        "dense_base": choice.dense_base,
        "num_workers": config.ray.min_workers,
        "max_workers": config.ray.max_workers,
        "max_length": batch.length,
        "answer_tokens": batch.answers,
        "device": device.name,
        "device_memory_bytes": device.memory,
        "fits": device.holds(choice.parts.total),
        "margin": MARGIN if device.gpu else 0.0,
        "advice": better
        and {"settings": better.settings(), "changes": better.changes(choice), "memory_bytes": better.parts.as_json()},
        "full_fine_tuning": _full_fine_tuning(config, base, batch, choice.parts),
        **_progress(config, stats, batch, device),
    }


def compared(config: RunConfig, base: "PretrainedConfig") -> list[dict[str, Any]]:
    """The figures of every method at its default rank, other keys as in the config; `refused` says why one has none."""
    rows = []
    rehearsed: dict[tuple[str, int], Rehearsal] = {}
    names: list[MethodName] = list(METHODS)  # type: ignore[arg-type]
    for name in names:
        method = MethodConfig(name=name, dropout=config.method.dropout, target_modules=config.method.target_modules)
        other = config.model_copy(update={"method": method})
        # A ZeRO stage that this method does not support is replaced by the nearest one that it does.
        train = config.train.model_copy(update={"zero_stage": nearest_legal(other.cell).zero_stage})
        other = other.model_copy(update={"train": train})
        row: dict[str, Any] = {
            "method": name,
            "base": method.row.base,
            "rank": method.r,
            "learning_rate": method.row.learning_rate,
        }
        try:
            rehearsal = Rehearsal.of(other, base)
        except ConfigError as exc:
            rows.append({**row, "refused": str(exc)})
            continue
        # The memory of a step depends on the adapter alone, not on how the base is stored or the update is scaled.
        alike = rehearsed.setdefault((method.row.adapter, method.r), rehearsal)
        batch = WorstBatch.planned(other)
        memory = capacity.chosen(other, rehearsal, batch, capacity.step_of(other, alike, batch)).parts.as_json()
        rows.append({**row, **capacity.counts(rehearsal.stats), "memory_bytes": memory})
    return rows


def _full_fine_tuning(
    config: RunConfig, base: "PretrainedConfig", batch: WorstBatch, adapter_parts: Parts
) -> dict[str, Any]:
    """The same training with all weights of the base trained, in bfloat16 with float32 master weights."""
    train, records = config.train, capacity.records_at_once(config, batch.length)
    whole = Rehearsal(
        base, None, reference=config.model.base, use_gpu=config.ray.use_gpu, attention=config.model.attention
    )
    parts = plan(
        whole.stats,
        whole.step(records, batch.length, checkpointing=train.gradient_checkpointing),
        base="bf16",
        answers=batch.answers * records,
        layout=Layout(config.ray.min_workers, train.zero_stage, train.cpu_offload, train.optimizer),
        use_gpu=config.ray.use_gpu,
        trains_base=True,
    )
    return {
        "memory_bytes": parts.as_json(),
        "times": parts.total / adapter_parts.total,
        "times_between_steps": parts.states / max(1, adapter_parts.states),
    }


def _progress(config: RunConfig, stats: ModelStats, batch: WorstBatch, device: Device) -> Mapping[str, Any]:
    """Speed, time and cost; None where they cannot be known, with the reason."""
    tokens = _most_tokens(config)
    if device.gpu is None:
        keys = ["tokens_per_s", "time_s", "cost", "price_per_hour", "s_per_million_tokens", "cost_per_million_tokens"]
        without = "without a GPU a run shows them from its first steps"
        reason = "name the GPU with ray.gpu" if config.ray.use_gpu else without
        return {**dict.fromkeys(keys), "most_tokens": tokens, "speed_unknown_because": reason}
    expected = speed(
        stats,
        device.gpu,
        num_gpus=config.ray.min_workers,
        base=config.method.row.base,
        adapter=config.method.row.adapter,
        length=batch.length,
        answer_share=batch.answers / batch.length,
        checkpointing=config.train.gradient_checkpointing,
    )
    own_price = config.ray.gpu_price_per_hour
    price = device.gpu.price_per_hour if own_price is None else own_price
    per_second = price * config.ray.min_workers / 3600
    time_s = tokens / expected.tokens_per_s if tokens else None
    return {
        "tokens_per_s": expected.tokens_per_s,
        "speed_is_rough": expected.is_rough or config.train.activation_offloading,
        "flops_per_token": expected.flops_per_token,
        "most_tokens": tokens,
        "time_s": time_s,
        "cost": time_s * per_second if time_s is not None else None,
        "s_per_million_tokens": MILLION / expected.tokens_per_s,
        "cost_per_million_tokens": MILLION / expected.tokens_per_s * per_second,
        "price_per_hour": price,
        "price_source": f"{device.gpu.price_source}, {PRICED}" if own_price is None else "ray.gpu_price_per_hour",
        "has_bf16": device.gpu.capability >= FIRST_WITH_BFLOAT16,
        "dtype": dtype_on(config.train.dtype, device.gpu.capability),
    }


def _most_tokens(config: RunConfig) -> int | None:
    """An upper bound, with every record as long as the context, if the number of records is known."""
    train, limit = config.train, config.data.max_records
    steps = train.max_steps or None
    if limit:
        per_epoch = -(-round(limit * (1 - config.data.eval_share)) // train.batch_size)
        steps = min(steps or per_epoch * train.epochs, per_epoch * train.epochs)
    return steps * train.batch_size * config.model.max_length if steps else None


if __name__ == "__main__":
    main()
