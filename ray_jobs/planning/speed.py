"""Estimated training speed, from operation counts and the efficiency of published trainings. Pure functions.

Per token, each weight of the frozen base takes two operations in the forward pass and two in the backward pass, for the
gradient of its input; a trained weight takes two more, for its own gradient. Recomputing activations repeats the
forward pass.
"""

from dataclasses import dataclass

from components.config.methods import AdapterKind, BaseFormat
from components.config.ray import Gpu
from ray_jobs.planning.rehearsal import ModelStats

# Share of the data sheet's dense rate that a training achieves, counting all operations above, also recomputed ones.
# Calibrated on published LoRA trainings, which are listed with their sources in tests/models/published.py.
ACHIEVED = 0.44
LONGEST = 8192  # tokens, the longest records among these trainings
# Dequantisation costs time as well: in LLaMA-Factory's and Qwen's tables QLoRA has 0.80 to 0.87 of LoRA's speed.
BASE_FACTOR: dict[BaseFormat, float] = {"bf16": 1.0, "nf4": 0.82, "int8": 0.82}
# Each step computes the norm of all weights: 1,191 s against LoRA's 942 s in peft's own comparison (MetaMathQA, 3B).
ADAPTER_FACTOR: dict[AdapterKind, float] = {"lora": 1.0, "dora": 942 / 1191, "vera": 1.0, "dvora": 942 / 1191}


@dataclass(frozen=True)
class Speed:
    """Expected speed of the whole group of workers."""

    flops_per_token: float
    tokens_per_s: float
    is_rough: bool
    """Whether no published training calibrates the estimate: another GPU, longer records, or experts."""


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
    """Estimate the speed. `answer_share` is the share of all positions that the head computes logits for."""
    operations = flops_per_token(stats, length=length, answer_share=answer_share, checkpointing=checkpointing)
    rate = gpu.tflops * 1e12 * ACHIEVED * BASE_FACTOR[base] * ADAPTER_FACTOR[adapter] * num_gpus
    has_experts = stats.experts > 0
    return Speed(operations, rate / operations, not gpu.is_calibrated or length > LONGEST or has_experts)


def flops_per_token(stats: ModelStats, *, length: int, answer_share: float, checkpointing: bool) -> float:
    """Operations of one token, forward and backward, averaged over a record of `length` tokens."""
    # Causal attention: each position attends to half of the others on average, in two products of the heads' width.
    attention = 2 * length * stats.attention_width * stats.num_layers
    forward = 2 * (stats.active + stats.applied) + attention
    # Fused attention recomputes its scores in the backward pass: five products instead of two (arXiv:2205.14135).
    backward = 2 * (stats.active + 2 * stats.applied) + 2.5 * attention
    head = 4 * answer_share * stats.vocabulary * stats.width
    return forward * (2 if checkpointing else 1) + backward + head
