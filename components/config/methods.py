"""The table of methods: every name people know, as a row over orthogonal axes.

Torch-free, so that the config refuses an illegal run before anything is started. Adding a method means adding a row
here, and where peft has no class for it, one file in `ray_jobs/adapters/`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

AdapterKind = Literal["lora", "dora", "vera", "dvora"]
Scaling = Literal["classic", "rslora"]
Init = Literal["default", "loftq"]
BaseFormat = Literal["bf16", "nf4", "int8"]
MethodName = Literal["lora", "qlora", "rslora", "dora", "qdora", "vera", "dvora", "loftq"]

# LoRA's own usual peak rate with Adam, which the table's rates are relative to.
LORA_LEARNING_RATE = 2e-4
# rsLoRA's default, at every rank: at rank 16 its scaling is 8.
RSLORA_ALPHA = 32.0


@dataclass(frozen=True)
class Method:
    """One row: four axes, and what a config leaves out."""

    adapter: AdapterKind
    """What is trained."""
    scaling: Scaling
    """How the update is scaled: alpha / r, or alpha / sqrt(r). VeRA's vectors scale themselves."""
    init: Init
    """How the update starts: as zero, or as what quantising the base took away."""
    base: BaseFormat
    """How the frozen base is stored."""
    rank: int
    """Default rank."""
    relative_rate: float
    """Default peak learning rate, relative to LoRA's; docs/methods.md says where each comes from."""
    source: str

    @property
    def has_alpha(self) -> bool:
        return self.adapter in ("lora", "dora")

    def alpha(self, rank: int) -> float:
        """Default alpha: for a classic scaling of 2 twice the rank. Divided by sqrt(rank) it must not depend on the
        rank, or the update would grow with it, which rsLoRA is there to prevent (arXiv:2312.03732, theorem 3.2)."""
        return RSLORA_ALPHA if self.scaling == "rslora" else 2.0 * rank

    @property
    def learning_rate(self) -> float:
        return LORA_LEARNING_RATE * self.relative_rate


METHODS: dict[str, Method] = {
    "lora": Method("lora", "classic", "default", "bf16", 16, 1.0, "arXiv:2106.09685"),
    "qlora": Method("lora", "classic", "default", "nf4", 16, 1.0, "arXiv:2305.14314"),
    "rslora": Method("lora", "rslora", "default", "bf16", 16, 0.3, "arXiv:2312.03732"),
    "dora": Method("dora", "classic", "default", "bf16", 16, 1.0, "arXiv:2402.09353"),
    "qdora": Method("dora", "classic", "default", "nf4", 16, 1.0, "arXiv:2402.09353 on the base of arXiv:2305.14314"),
    "vera": Method("vera", "classic", "default", "bf16", 256, 30.0, "arXiv:2310.11454"),
    "dvora": Method("dvora", "classic", "default", "bf16", 256, 30.0, "arXiv:2402.09353, section on DVoRA"),
    "loftq": Method("lora", "classic", "loftq", "nf4", 16, 0.5, "arXiv:2310.08659"),
}
OWN_BASE = frozenset({"loftq"})
"""Values of `init` that make a base for the adapter. Peft's own starts, such as PiSSA's, are none of them: they change
the weights of the base in place, on which others are then measured."""
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank may take: an adapter takes the smallest that is no less than its rank."""


# Which combinations of method, base and ZeRO stage are right, and for each that is not, why and what comes nearest.
#
# The matrix test trains every cell that this file lets pass. A cell is refused here only for a reason: it has no
# meaning, or a library computes something else in silence.

AXES = ("adapter", "scaling", "init", "base")
"""Keys of `method`; a cell's others are keys of `train`."""


def key_of(field: str) -> str:
    """The config key of a cell's field."""
    return f"{'method' if field in AXES else 'train'}.{field}"


@dataclass(frozen=True)
class Cell:
    """One combination; the names are those of the config's fields."""

    adapter: AdapterKind
    scaling: Scaling
    init: Init
    base: BaseFormat
    zero_stage: int
    cpu_offload: bool
    gradient_checkpointing: bool

    def described(self, than: "Cell") -> str:
        """Where this cell differs from another, as settings."""
        return ", ".join(
            setting(key_of(field.name), getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(than, field.name)
        )


@dataclass(frozen=True)
class LegalityRule:
    """What is refused, why, and the change that mends it."""

    refuses: Callable[[Cell], bool]
    reason: str
    mend: dict[str, Any]


RULES = [
    LegalityRule(
        lambda cell: cell.init == "loftq" and cell.base != "nf4",
        "LoftQ makes up for what 4-bit quantisation takes away, and this base is not NF4",
        {"base": "nf4"},
    ),
    LegalityRule(
        lambda cell: cell.init != "default" and cell.adapter != "lora",
        "a start other than default is one of LoRA's two matrices, and this adapter has others",
        {"init": "default"},
    ),
    LegalityRule(
        lambda cell: cell.scaling == "rslora" and cell.adapter in ("vera", "dvora"),
        "rsLoRA scales by alpha / sqrt(r), and VeRA's vectors have no alpha to scale",
        {"scaling": "classic"},
    ),
    LegalityRule(
        lambda cell: cell.base == "int8" and cell.zero_stage == 3,
        "bitsandbytes keeps every int8 weight whole beside its ZeRO-3 shard, which saves no memory (measured with "
        "bitsandbytes 0.50), and in older releases it trained on wrong ones in silence (bitsandbytes#1451)",
        {"zero_stage": 2},
    ),
    LegalityRule(
        lambda cell: cell.cpu_offload and cell.zero_stage == 0,
        "without ZeRO there is no partition to keep in host memory",
        {"zero_stage": 1},
    ),
]


def refusals(cell: Cell) -> Iterator[LegalityRule]:
    """Every rule that the cell breaks; none for a legal one."""
    return (rule for rule in RULES if rule.refuses(cell))


def nearest_legal(cell: Cell) -> Cell:
    """The legal cell that the rules' changes lead to; the cell itself when it is legal."""
    while rule := next(refusals(cell), None):
        cell = replace(cell, **rule.mend)
    return cell


def setting(key: str, value: Any) -> str:
    """KEY=VALUE, as --set takes it."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
