"""The table of methods: every name people know, as a row over orthogonal axes.

Torch-free, so that the config refuses an unknown method before anything is started. Adding a method means adding a row
here and, where peft has no class for it, one file in `ray_jobs/adapters/`.
"""

from dataclasses import dataclass
from typing import Literal

AdapterKind = Literal["lora", "dora"]
Scaling = Literal["classic", "rslora"]
BaseFormat = Literal["bf16", "nf4"]


@dataclass(frozen=True)
class Method:
    """One row: what is trained, how its update is scaled, and how the frozen base is stored."""

    adapter: AdapterKind
    scaling: Scaling
    base: BaseFormat
    source: str


METHODS: dict[str, Method] = {
    "lora": Method("lora", "classic", "bf16", "arXiv:2106.09685"),
    "qlora": Method("lora", "classic", "nf4", "arXiv:2305.14314"),
    "rslora": Method("lora", "rslora", "bf16", "arXiv:2312.03732"),
    "dora": Method("dora", "classic", "bf16", "arXiv:2402.09353"),
    "qdora": Method("dora", "classic", "nf4", "arXiv:2402.09353 on the base of arXiv:2305.14314"),
}

MethodName = Literal["lora", "qlora", "rslora", "dora", "qdora"]
