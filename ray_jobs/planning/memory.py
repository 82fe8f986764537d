"""Memory of one worker, by part: pure arithmetic over the counts of a rehearsal.

Names: n parameters, N workers. Everything is in bytes and for one worker.

weights      the frozen base, as it is stored
adapter      the adapter's own weights, bfloat16
gradients    of the trained parameters, bfloat16
optimizer    float32 master weights and AdamW's two moments, 12 n (arXiv:1910.02054, section 3.1); 6 n with 8-bit AdamW
activations  kept for the backward pass, and the layers' workspace, at the peak of a step
logits       of the labelled positions, and their gradients: below ZeRO-3 only of one chunk of them at a time
overhead     all else: CUDA context, communication buffers, fragmentation
"""

import math
from dataclasses import asdict, dataclass

from components.config.methods import AdapterKind, BaseFormat
from components.config.ray import Gpu
from components.config.train import Optimizer
from ray_jobs.planning.rehearsal import ModelStats, StepMemory
from ray_jobs.text.answer_loss import chunk_positions
from ray_jobs.training.zero import BUCKET_ELEMENTS, LIVE_ELEMENTS

BF16, FLOAT32 = 2, 4
GIB = 2**30

# bitsandbytes: blocks of 64 weights with one 8-bit constant each, itself quantised in blocks of 256 with one float32.
# Each layer also has both code books and an offset, float32 (functional.py, QuantState).
NF4_BLOCK, NF4_OUTER_BLOCK, NF4_LAYER_BYTES = 64, 256, (16 + 256 + 1) * FLOAT32

# AdamW's two moments per parameter; in 8 bits, with a float32 scale for each block of 256 (bitsandbytes,
# optim/optimizer.py).
MOMENT_BYTES: dict[Optimizer, float] = {
    "adamw": 2 * FLOAT32,
    "adamw_8bit": 2 * (1 + FLOAT32 / 256),
    "paged_adamw_8bit": 2 * (1 + FLOAT32 / 256),
}

# Bytes per logit at the peak of the loss: the float32 log-probability and its gradient, and one value in bfloat16.
LOGIT_BYTES = 2 * FLOAT32 + BF16

# A CUDA context with cuBLAS, cuDNN and NCCL loaded takes 0.5 to 1 GiB, by driver and GPU.
CONTEXT_BYTES = int(0.7 * GIB)
# PyTorch's allocator reserves a little more than the temporary tensors use: blocks of 2 MiB, split and kept.
FRAGMENTATION = 0.1
# A Python process with PyTorch, transformers, peft, DeepSpeed and Ray imported, on a CPU worker; on a GPU worker CUDA's
# libraries come on top.
PROCESS_BYTES = int(0.6 * GIB)
CUDA_PROCESS_BYTES = int(2.5 * GIB)

# How far published figures exceed their plans: this margin is enough for nine in ten of tests/models/published.py.
MARGIN = 0.2


@dataclass(frozen=True)
class Layout:
    """Where the parts of a training lie, and in how many bytes: `train`'s keys of the same names."""

    num_workers: int
    zero_stage: int
    cpu_offload: bool = False
    optimizer: Optimizer = "adamw"
    dense_base: bool = False
    """Whether the layers and the head are in float32, which most CPUs multiply in; fewer of them with bfloat16."""
    activation_offloading: bool = False

    def part(self, from_stage: int) -> float:
        """The fraction that one worker holds of something that is partitioned from this ZeRO stage on."""
        return 1 / self.num_workers if self.zero_stage >= from_stage else 1.0


@dataclass(frozen=True)
class Parts:
    """Memory of one worker's device."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    host: int = 0
    """Host memory: the process, what is offloaded, and what a paged optimizer may move there; not in the total."""

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.overhead

    @property
    def states(self) -> int:
        """Memory in use between two steps, which does not depend on the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    def as_json(self) -> dict[str, int]:
        parts = asdict(self)
        del parts["host"]
        return {**parts, "total": self.total}


def plan(
    stats: ModelStats,
    step: StepMemory,
    *,
    base: BaseFormat,
    answers: int,
    layout: Layout,
    use_gpu: bool = True,
    trains_base: bool = False,
    in_chunks: bool = True,
) -> Parts:
    """Memory of one worker. `answers`: labelled tokens in a micro-batch; B x T for a trainer that scores all tokens.
    `trains_base` means full fine-tuning, the head included; `in_chunks` is False for a trainer that holds the logits of
    all answers at once."""
    weights = weight_bytes(stats, base, layout)
    if layout.dense_base:
        layers = sum(outputs * inputs for outputs, inputs in stats.matrices)
        weights = FLOAT32 * (layers + stats.vocabulary * stats.width) + BF16 * (stats.parameters - layers)
    adapter = 0 if trains_base else math.ceil(adapter_bytes(stats) * layout.part(3))
    gradients = math.ceil(BF16 * stats.trainable * layout.part(2))
    masters, moments = (
        math.ceil(per_weight * stats.trainable * layout.part(1))
        for per_weight in (FLOAT32, MOMENT_BYTES[layout.optimizer])
    )
    in_chunks = in_chunks and not trains_base and layout.zero_stage < 3
    at_once = chunk_positions(stats.vocabulary) if in_chunks else answers
    logits = logits_bytes(answers, stats, at_once)
    # The loss and the backward pass through the layers reach their peaks one after the other.
    activations = step.kept + max(0, step.workspace - logits)
    offloaded = 0
    if layout.activation_offloading:  # except for the current layer
        offloaded = step.inputs - math.ceil(step.inputs / stats.num_layers)
        activations -= offloaded
    overhead = buffer_bytes(stats, base, layout, trains_base=trains_base)
    overhead += CONTEXT_BYTES + int(FRAGMENTATION * (activations + logits)) if use_gpu else PROCESS_BYTES
    host = offloaded + (CUDA_PROCESS_BYTES if use_gpu else 0)  # on a CPU worker the host is the device
    if layout.optimizer == "paged_adamw_8bit":
        host, moments = host + moments, 0
    if layout.cpu_offload:
        host, masters, moments = host + masters + moments, 0, 0
        if layout.zero_stage == 3:
            host += weights
            # For 4-bit weights, PEFT's DeepSpeed guide reports more GPU memory with offloading than without.
            weights = 0 if base == "bf16" else weights
    return Parts(weights, adapter, gradients, masters + moments, activations, logits, overhead, host)


@dataclass(frozen=True)
class Reading:
    """Memory of a device that evaluates a model: the whole model, even if training sharded it."""

    weights: int
    adapter: int
    cache: int  # KV cache of all records of a batch
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def reading(
    stats: ModelStats,
    workspace: int,
    *,
    base: BaseFormat,
    records: int,
    length: int,
    answers: int,
    use_gpu: bool = True,
) -> Reading:
    """Memory to evaluate `records` records of `length` tokens, the last `answers` of which are the answer: they are
    scored first, and then generated with a KV cache. `workspace` is that of a forward pass over them."""
    cache = BF16 * stats.cached * records * length
    logits = logits_bytes(answers * records, stats, chunk_positions(stats.vocabulary))
    overhead = buffer_bytes(stats, base, Layout(1, 0), trains_base=False)
    overhead += CONTEXT_BYTES + int(FRAGMENTATION * (workspace + max(cache, logits))) if use_gpu else PROCESS_BYTES
    # Only the larger of the two counts, as they are not in memory at the same time.
    cache, logits = (cache, 0) if cache > logits else (0, logits)
    return Reading(weight_bytes(stats, base, Layout(1, 0)), adapter_bytes(stats), cache, workspace, logits, overhead)


def weight_bytes(stats: ModelStats, base: BaseFormat, layout: Layout) -> int:
    """Bytes of the base. Embeddings, head, norms and biases stay bfloat16 in every format."""
    sizes = [outputs * inputs for outputs, inputs in stats.matrices]
    packed = sum({"nf4": math.ceil(size / 2), "int8": size, "bf16": BF16 * size}[base] for size in sizes)
    constants = sum(_constant_bytes(outputs, inputs, base) for outputs, inputs in stats.matrices)
    rest = stats.parameters - sum(sizes)
    # ZeRO-3 shards only parameters; a quantised weight's constants are none, so every worker holds all of them.
    return math.ceil((packed + BF16 * rest) * layout.part(3)) + constants


def _constant_bytes(outputs: int, inputs: int, base: BaseFormat) -> int:
    """Bytes of one matrix's quantisation constants: arXiv:2305.14314, section 3, or one float32 per row for int8."""
    if base == "bf16":
        return 0
    if base == "int8":
        return FLOAT32 * outputs
    blocks = math.ceil(outputs * inputs / NF4_BLOCK)
    return blocks + FLOAT32 * math.ceil(blocks / NF4_OUTER_BLOCK) + NF4_LAYER_BYTES


def adapter_bytes(stats: ModelStats) -> int:
    """Bytes of the adapter's trained and frozen parameters."""
    return BF16 * (stats.trainable + stats.frozen_adapter)


def logits_bytes(answers: int, stats: ModelStats, at_once: int) -> int:
    """Bytes of logits and gradients of the positions computed at once, and of the hidden states of all answers."""
    return min(answers, at_once) * LOGIT_BYTES * stats.vocabulary + answers * 2 * BF16 * stats.width


def buffer_bytes(stats: ModelStats, base: BaseFormat, layout: Layout, *, trains_base: bool) -> int:
    """Bytes of the largest weight when dequantised, ZeRO's buckets, and the parameters that ZeRO-3 gathers."""
    largest = max((outputs * inputs for outputs, inputs in stats.matrices), default=0)
    result = BF16 * largest if base != "bf16" else 0
    if layout.zero_stage >= 1 and layout.num_workers > 1:
        result += 2 * BF16 * min(BUCKET_ELEMENTS, stats.trainable)
    if layout.zero_stage == 3 and layout.num_workers > 1:
        whole = weight_bytes(stats, base, Layout(1, 0))
        gathered = BF16 * (LIVE_ELEMENTS + max(largest, stats.vocabulary * stats.width))
        result += min(whole, gathered)
    return result


def parts_text(parts: Parts) -> str:
    """The parts in GiB for a sentence, largest first, without those below one per cent of the total."""
    largest = sorted(((size, name) for name, size in parts.as_json().items() if name != "total"), reverse=True)
    return ", ".join(f"{name} {size / GIB:.3g}" for size, name in largest if size >= parts.total / 100)


# Per token, each weight of the frozen base takes two operations in the forward pass and two in the backward pass, for
# the gradient of its input; a trained weight takes two more, for its own gradient. Recomputing activations repeats the
# forward pass.

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
    is_rough: bool  # whether no published training calibrates the estimate: another GPU, longer records, or experts


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
