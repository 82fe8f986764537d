"""The GPUs that a run can be planned for: memory, dense bfloat16 rate and list price, each with its source."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["T4", "V100", "L4", "A10G", "A100-40G", "A100-80G", "L40S", "RTX4090", "H100", "H200"]


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its maker's data sheet."""

    memory_gib: float
    """Memory, in GiB."""
    tflops: float
    """Dense 16-bit matrix rate in 10^12 operations a second, without sparsity."""
    price_per_hour: float
    """US dollars, on demand."""


GPUS: dict[str, Gpu] = {}
