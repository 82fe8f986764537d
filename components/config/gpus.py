"""The GPUs that a run can be planned for: memory, dense 16-bit rate and list price, each with its source."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["T4", "V100", "L4", "A10G", "A100-40G", "A100-80G", "L40S", "RTX4090", "H100", "H200"]

PRICED = "November 2026"


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its maker's data sheet."""

    memory_gib: float
    """What the driver reports, in GiB: less than the data sheet's round number."""
    tflops: float
    """Dense 16-bit matrix rate with float32 sums, in 10^12 operations a second, without sparsity."""
    price_per_hour: float
    """US dollars, on demand, one GPU's part of the smallest machine that has it."""
    price_source: str
    product: str
    """What NVIDIA's GPU feature discovery labels a node with, as nvidia.com/gpu.product."""
    is_calibrated: bool = False
    """Whether planned speeds were calibrated on published trainings on it."""
    has_bf16: bool = True
    """Whether its matrix units know bfloat16; where not, trainings are in float16."""


# Rates: NVIDIA's data sheets of each product (tensor cores, no sparsity). Prices: AWS, us-east-1, Linux, on demand, by
# instance; p4d, p4de and p5 as read on 2026-11-09, p5en on 2026-08-06, g5 in June 2026, the others as of 2025. The
# RTX 4090 is no data-centre product: RunPod, secure cloud, 2025. Labels: of the variant that is priced (SXM, not PCIe).
GPUS: dict[str, Gpu] = {
    "T4": Gpu(15.0, 65.0, 0.526, "AWS g4dn.xlarge", "Tesla-T4", has_bf16=False),
    "V100": Gpu(15.8, 125.0, 3.06, "AWS p3.2xlarge", "Tesla-V100-SXM2-16GB", has_bf16=False),
    "L4": Gpu(22.5, 121.0, 0.805, "AWS g6.xlarge", "NVIDIA-L4"),
    "A10G": Gpu(22.5, 70.0, 1.006, "AWS g5.xlarge", "NVIDIA-A10G"),
    "A100-40G": Gpu(39.6, 312.0, 2.74, "AWS p4d.24xlarge / 8", "NVIDIA-A100-SXM4-40GB", is_calibrated=True),
    "A100-80G": Gpu(79.3, 312.0, 3.43, "AWS p4de.24xlarge / 8", "NVIDIA-A100-SXM4-80GB", is_calibrated=True),
    "L40S": Gpu(45.0, 362.0, 1.861, "AWS g6e.xlarge", "NVIDIA-L40S"),
    "RTX4090": Gpu(24.0, 165.0, 0.69, "RunPod, secure cloud", "NVIDIA-GeForce-RTX-4090"),
    "H100": Gpu(79.6, 989.0, 6.88, "AWS p5.48xlarge / 8", "NVIDIA-H100-80GB-HBM3", is_calibrated=True),
    "H200": Gpu(140.4, 989.0, 7.91, "AWS p5en.48xlarge / 8", "NVIDIA-H200"),
}
