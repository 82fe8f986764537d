"""How fast a training will go, from its arithmetic and from what published trainings achieve. Pure functions.

Each weight of the frozen base takes part in two operations for each token forward and two backward, to pass the
gradient on; a trained one in two more, for its own. Recomputing activations repeats the forward pass.
"""

from dataclasses import dataclass

from components.config.gpus import Gpu
from components.config.methods import AdapterKind, BaseFormat
from ray_jobs.planning.rehearsal import ModelStats

# Share of the data sheet's dense rate that a training achieves, counting every operation above, recomputed ones too.
# Calibrated on published LoRA trainings, of which tests/models/published.py holds each with its source.
ACHIEVED = 0.44
LONGEST = 8192  # tokens of a record, of those
# Dequantising costs time as well: LLaMA-Factory's and Qwen's own tables have QLoRA at 0.80 to 0.87 of LoRA's speed.
BASE_FACTOR: dict[BaseFormat, float] = {"bf16": 1.0, "nf4": 0.82, "int8": 0.82}
# The norm of every weight at every step: 1,191 s against LoRA's 942 s in peft's own comparison (MetaMathQA, 3B).
ADAPTER_FACTOR: dict[AdapterKind, float] = {"lora": 1.0, "dora": 942 / 1191, "vera": 1.0, "dvora": 942 / 1191}


@dataclass(frozen=True)
class Speed:
    """What to expect of the whole group of workers."""

    flops_per_token: float
    tokens_per_s: float
    is_rough: bool
    """No published training was at hand to calibrate it on: another GPU, longer records, or experts."""


def speed(
    stats: ModelStats,
    gpu: Gpu,
    *,
    num_gpus: int,
    base: BaseFormat,
    adapter: AdapterKind,
    length: int,
    answer_share: float,
    checkpointing: bool,
) -> Speed:
    """`answer_share`: what part of all positions the head computes logits for."""
    operations = flops_per_token(stats, length=length, answer_share=answer_share, checkpointing=checkpointing)
    rate = gpu.tflops * 1e12 * ACHIEVED * BASE_FACTOR[base] * ADAPTER_FACTOR[adapter] * num_gpus
    has_experts = stats.experts > 0
    return Speed(operations, rate / operations, not gpu.is_calibrated or length > LONGEST or has_experts)


def flops_per_token(stats: ModelStats, *, length: int, answer_share: float, checkpointing: bool) -> float:
    """Operations of one token, forward and backward, averaged over a record of `length` tokens."""
    # Causal attention: each position meets half of the others, in two products of the heads' width.
    attention = 2 * length * stats.attention_width * stats.num_layers
    forward = 2 * (stats.active + stats.applied) + attention
    # Fused attention recomputes its scores going back: five products where there were two (arXiv:2205.14135).
    backward = 2 * (stats.active + 2 * stats.applied) + 2.5 * attention
    head = 4 * answer_share * stats.vocabulary * stats.width
    return forward * (2 if checkpointing else 1) + backward + head
