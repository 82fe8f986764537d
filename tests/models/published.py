"""Published memory and speed of trainings on GPUs, each with what it was measured on and where it says so.

Every one of these trainers computes logits for all positions unless said otherwise; plans for them do so as well.
"""

from dataclasses import dataclass
from typing import Any

from components.config.methods import BaseFormat

QWEN = "QwenLM/Qwen README, Profiling of Memory and Speed: A100-80G, batch 1, FlashAttention 2, checkpointing, r=64"
FACTORY = "LLaMA-Factory wiki, Performance-comparison: A100-40G, FlashAttention 2, r=8 on all layers"
PEFT = "PEFT docs, accelerate/deepspeed.md: Llama-70B, 2,048 tokens, checkpointing, r=8 on all layers"
TORCHTUNE = "torchtune README, Memory and training speed: batch 2, packed to 2,048 tokens, r=8 (70B: 16)"


@dataclass(frozen=True)
class Memory:
    """Peak memory of one GPU."""

    who: str
    shape: str
    """In `tests.models.shapes`."""
    gb: float
    base: BaseFormat
    rank: int
    batch: int
    length: int
    why: str = ""
    """What is known to differ from Fineloop there."""
    checkpointing: bool = True
    all_logits: bool = True
    num_workers: int = 1
    zero_stage: int = 0
    cpu_offload: bool = False
    targets: Any = "all-linear"


FULL_BUCKETS = "DeepSpeed's default buckets, ten times ours: the published figure is higher"
CHUNKED = "GiB; compiled, and the loss is computed in chunks, so no logits stand in memory"

MEMORY = [
    Memory(FACTORY, "LLAMA_2_7B", 17, "bf16", 8, 4, 1024),
    Memory(FACTORY, "LLAMA_2_7B", 9, "nf4", 8, 4, 1024),
    Memory(FACTORY, "LLAMA_2_7B", 6, "nf4", 8, 1, 1024),
    Memory(FACTORY, "LLAMA_2_7B", 19, "nf4", 8, 1, 16384),
    Memory(QWEN, "QWEN_7B", 21.5, "bf16", 64, 1, 1024),
    Memory(QWEN, "QWEN_7B", 36.6, "bf16", 64, 1, 8192),
    Memory(QWEN, "QWEN_7B", 12.3, "nf4", 64, 1, 1024, why="GPTQ instead of NF4, both of 4 bits"),
    Memory(QWEN, "QWEN_14B", 35.3, "bf16", 64, 1, 1024),
    Memory(QWEN, "QWEN_72B", 62.9, "nf4", 64, 1, 1024, why="GPTQ instead of NF4, both of 4 bits"),
    Memory(PEFT, "LLAMA_2_70B", 64, "bf16", 8, 8, 2048, why=FULL_BUCKETS, num_workers=8, zero_stage=3),
    Memory(PEFT, "LLAMA_2_70B", 36.6, "nf4", 8, 2, 2048, why=FULL_BUCKETS, num_workers=2, zero_stage=3),
    Memory(TORCHTUNE, "LLAMA_3_8B", 16.2 * 1.074, "bf16", 8, 2, 2048, why=CHUNKED, all_logits=False),
    Memory(TORCHTUNE, "LLAMA_3_8B", 7.4 * 1.074, "nf4", 8, 2, 2048, why=CHUNKED, all_logits=False),
    Memory(
        "PEFT, method_comparison/MetaMathQA, lora--llama-3.2-3B-rank32.json: L40S, up to 768 tokens, cuda_memory_max",
        "LLAMA_32_3B", 22.27, "bf16", 32, 4, 768, checkpointing=False, targets=("q_proj", "v_proj"),
    ),
]  # fmt: skip

# Not used to make the plan: how far it lies from others' figures is measured on these. Rows that say why they differ by
# more than a fifth are of other code than ours; the tables of rounded figures say neither length nor batch.
FACTORY_TABLE = "LLaMA-Factory README, Hardware requirement: rounded estimates, length and batch not given"
UNSLOTH = "unsloth.ai/docs, Unsloth Requirements: the absolute minimum, with kernels of its own"
FSDP = "PEFT docs, accelerate/fsdp.md: Llama-70B, 2,048 tokens, checkpointing, r=8 on all layers"
DOUBLED = "rounded up: 13B in four bits is 7.2 GB of weights, and 6 was a 7B's"
OWN_KERNELS = "keeps no logits, and the head and the embeddings in fewer bits"

KEPT_BACK = [
    *(
        Memory(FACTORY, "LLAMA_2_7B", gb, "nf4", 8, 1, length)
        for length, gb in ((2048, 7), (4096, 9), (8192, 12), (32768, 32))
    ),
    Memory(FACTORY_TABLE, "LLAMA_2_7B", 16, "bf16", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_2_7B", 10, "int8", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_2_7B", 6, "nf4", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_2_13B", 32, "bf16", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_2_13B", 16, "int8", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_2_13B", 12, "nf4", 8, 1, 512, why=DOUBLED),
    Memory(FACTORY_TABLE, "LLAMA_1_33B", 80, "bf16", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_1_33B", 40, "int8", 8, 1, 512),
    Memory(FACTORY_TABLE, "LLAMA_1_33B", 24, "nf4", 8, 1, 512),
    Memory(FACTORY_TABLE, "MIXTRAL_8X7B", 120, "bf16", 8, 1, 512),
    Memory(UNSLOTH, "LLAMA_32_3B", 3.5, "nf4", 16, 1, 512, why=OWN_KERNELS),
    Memory(UNSLOTH, "LLAMA_32_3B", 8, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "MISTRAL_7B", 5, "nf4", 16, 1, 512, why=OWN_KERNELS),
    Memory(UNSLOTH, "MISTRAL_7B", 19, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "LLAMA_3_8B", 6, "nf4", 16, 1, 512, why=OWN_KERNELS),
    Memory(UNSLOTH, "LLAMA_3_8B", 22, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "QWEN_3_14B", 8.5, "nf4", 16, 1, 512, why=OWN_KERNELS),
    Memory(UNSLOTH, "QWEN_3_14B", 33, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "QWEN_25_32B", 26, "nf4", 16, 1, 512),
    Memory(UNSLOTH, "QWEN_25_32B", 76, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "LLAMA_3_70B", 41, "nf4", 16, 1, 512),
    Memory(UNSLOTH, "LLAMA_3_70B", 164, "bf16", 16, 1, 512),
    Memory(UNSLOTH, "LLAMA_31_405B", 237, "nf4", 16, 1, 512),
    Memory(
        TORCHTUNE, "LLAMA_3_8B", 30.3 * 1.074, "bf16", 8, 2, 2048,
        why="compiled, which fuses away activations", checkpointing=False, all_logits=False,
    ),
    Memory(
        TORCHTUNE, "LLAMA_3_70B", 27.6 * 1.074, "bf16", 16, 2, 2048, why=CHUNKED, all_logits=False, num_workers=8,
        zero_stage=3,
    ),
    Memory(FSDP, "LLAMA_2_70B", 35.6, "nf4", 8, 2, 2048, num_workers=2, zero_stage=3),
    Memory(
        FSDP, "LLAMA_2_70B", 19.6, "nf4", 8, 2, 2048, num_workers=2, zero_stage=3, cpu_offload=True,
        why="FSDP; with ZeRO-3 its authors saw no GPU memory saved",
    ),
    Memory(FSDP, "LLAMA_2_70B", 76, "bf16", 8, 8, 2048, num_workers=8, zero_stage=3, why="72 to 80; ZeRO-3 takes 64"),
]  # fmt: skip

# arXiv:2305.14314, abstract: a 65B model on one GPU of 48 GB. Batches of 16 in steps of one record, up to 512 tokens
# (table 9), r=64, and a paged optimizer, whose state may lie in host memory while it is not needed.
QLORA_65B = Memory("arXiv:2305.14314", "LLAMA_1_65B", 48, "nf4", 64, 1, 512)


@dataclass(frozen=True)
class Speed:
    """Tokens a second and GPU."""

    who: str
    shape: str
    """In `tests.models.shapes`."""
    tokens_per_s: float
    gpu: str
    base: BaseFormat
    rank: int
    length: int
    checkpointing: bool = True
    why: str = ""
    """What is known to differ from Fineloop there."""


# Where the plan says of itself that it is rough: on GPUs that no published training calibrated it for, and longer
# records than they have.
ROUGH_SPEED = [
    Speed(
        TORCHTUNE, "LLAMA_3_8B", 3083, "RTX4090", "bf16", 8, 2048,
        why="compiled; and twice the data sheet's rate, if sums are in float16",
    ),
    Speed(TORCHTUNE, "LLAMA_3_8B", 2413, "RTX4090", "nf4", 8, 2048, why="the same"),
    Speed(FACTORY, "LLAMA_2_7B", 3542, "A100-40G", "nf4", 8, 16384, why="a table whose speed rises with lengths"),
]  # fmt: skip

SPEED = [
    Speed(FACTORY, "LLAMA_2_7B", 2954, "A100-40G", "bf16", 8, 1024),
    Speed(FACTORY, "LLAMA_2_7B", 2415, "A100-40G", "nf4", 8, 1024),
    Speed(QWEN, "QWEN_7B", 8 * 1024 / 2.8, "A100-80G", "bf16", 64, 1024),
    Speed(QWEN, "QWEN_7B", 8 * 1024 / 3.5, "A100-80G", "nf4", 64, 1024),
    Speed(QWEN, "QWEN_7B", 8 * 8192 / 21.3, "A100-80G", "bf16", 64, 8192),
    Speed(QWEN, "QWEN_14B", 8 * 1024 / 4.4, "A100-80G", "bf16", 64, 1024),
    Speed("NeMo Automodel, performance-summary.mdx: MBS 2", "LLAMA_3_8B", 12473, "H100", "bf16", 8, 4096, False),
    Speed("NeMo Automodel, performance-summary.mdx: TP 2", "LLAMA_3_70B", 1092, "H100", "bf16", 8, 4096),
    Speed(
        "Answer.AI fsdp_qlora, benchmarks_03_2024.md: 1,024 x 2,048 tokens on 4 GPUs in 667 s",
        "LLAMA_2_70B", 1024 * 2048 / 667 / 4, "H100", "nf4", 64, 2048,
    ),
]  # fmt: skip
