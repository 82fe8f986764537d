"""Which combinations of method, base and ZeRO stage are right, and for each that is not, why and what comes nearest.

The matrix test trains every cell that this file lets pass. A cell is refused here only for a reason: it has no meaning,
or a library computes something else in silence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from components.config.methods import AdapterKind, BaseFormat, Init, Scaling

FIELDS = {
    "adapter": "method.adapter",
    "scaling": "method.scaling",
    "init": "method.init",
    "base": "method.base",
    "zero_stage": "train.zero_stage",
    "cpu_offload": "train.cpu_offload",
    "gradient_checkpointing": "train.gradient_checkpointing",
}


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
            setting(FIELDS[field.name], getattr(self, field.name))
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
