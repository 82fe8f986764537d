"""What CPU workers multiply bfloat16 operands in: bfloat16 or float32, whichever this processor is faster at.

Measured, in milliseconds, rather than looked up: the list of instruction sets never ends, and which of them PyTorch has
kernels for changes. The ratios lie far from the limit: FLOP/s in float32 over those in bfloat16, one thread, forward
and backward, torch 2.13, are 0.4 with AVX-512 BF16, less with AMX, 2 with AVX-512 alone and 14 and more with AVX2.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from components.shared.ray_config import CpuMatmulDtype, MatmulDtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CLEARLY = 1.5
"""Float32 must be so many times as fast: it reads a 16-bit weight once more than bfloat16 does, to widen it."""
ROWS = 32
SMALLEST, LARGEST = 256, 1024
"""Outputs and inputs that are measured: in a smaller product starting it takes most of the time, and for a larger one
the slowest processors take seconds."""
REPEATS = 3


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a linear layer, forward and backward, on the threads that this process has."""

    bfloat16: float
    float32: float

    @property
    def faster(self) -> MatmulDtype:
        """What to multiply in."""
        return "float32" if self.float32 > CLEARLY * self.bfloat16 else "bfloat16"


def choose(wanted: CpuMatmulDtype, shape: tuple[int, int], *, use_gpu: bool = False) -> MatmulDtype:
    """What this process multiplies in, by itself. `wanted` is ray.cpu_matmul_dtype, `shape` as `typical_shape` says."""
    return "bfloat16" if use_gpu else fixed(wanted) or measure(shape).faster


def agree(wanted: CpuMatmulDtype, shape: tuple[int, int]) -> MatmulDtype:
    """The same for all workers of a gloo group, each of which must call it: of each dtype the slowest rate counts."""
    if dtype := fixed(wanted):
        return dtype
    measured: list[Rates] = [measure(shape)] * dist.get_world_size()
    dist.all_gather_object(measured, measured[0])
    return slowest(measured).faster


def slowest(measured: Sequence[Rates]) -> Rates:
    """The rates that a group of workers can count on."""
    return Rates(min(rates.bfloat16 for rates in measured), min(rates.float32 for rates in measured))


def fixed(wanted: CpuMatmulDtype) -> MatmulDtype | None:
    """What the config says; None where it leaves that to a measurement."""
    return None if wanted == "auto" else wanted


def measure(shape: tuple[int, int]) -> Rates:
    """Both rates here and now, for a layer of so many outputs and inputs; takes up to half a second."""
    from ray_jobs import float32_layers

    outputs, inputs = (min(max(size, SMALLEST), LARGEST) for size in shape)
    x = torch.randn(ROWS, inputs).bfloat16().requires_grad_()
    weight = torch.randn(outputs, inputs).bfloat16()
    gradient = torch.randn(ROWS, outputs).bfloat16()
    operations = 2 * 2 * ROWS * outputs * inputs

    def rate(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        return operations / min(_seconds(lambda: linear(x, weight).backward(gradient)) for _ in range(REPEATS))

    rates = Rates(bfloat16=rate(torch.nn.functional.linear), float32=rate(float32_layers.linear))
    logger.debug("products here: %.3g FLOP/s in bfloat16, %.3g in float32", rates.bfloat16, rates.float32)
    return rates


def typical_shape(base: "PretrainedConfig") -> tuple[int, int]:
    """Outputs and inputs of the layer that most of a base's time goes into: its feed-forward's first."""
    text = base.get_text_config()  # of a model that also sees, what reads and writes
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.hidden_size


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
