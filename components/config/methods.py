"""The table of methods: every name people know, as a row over orthogonal axes.

Torch-free, so that the config refuses an illegal run before anything is started. Adding a method means adding a row
here and, where peft has no class for it or its start changes the base, one file in `ray_jobs/adapters/`.
"""

from dataclasses import dataclass
from typing import Literal

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
        """Whether the update is scaled by alpha at all."""
        return self.adapter in ("lora", "dora")

    def alpha(self, rank: int) -> float:
        """Default alpha: for a classic scaling of 2 twice the rank. Divided by sqrt(rank) it must not depend on the
        rank, or the update would grow with it, which rsLoRA is there to prevent (arXiv:2312.03732, theorem 3.2)."""
        return RSLORA_ALPHA if self.scaling == "rslora" else 2.0 * rank

    @property
    def learning_rate(self) -> float:
        """Default peak learning rate."""
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
OWN_BASE = frozenset(row.init for row in METHODS.values()) - {"default"}
"""Values of `init` that make a base for the adapter, in `ray_jobs/adapters/<init>/start.py`."""
