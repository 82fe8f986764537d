"""What CPU workers multiply bfloat16 operands in: bfloat16 or float32, whichever is faster on this processor.

Measured, in milliseconds, rather than looked up: the list of instruction sets never ends, and which of them PyTorch has
kernels for changes. The ratios are far from the limit: FLOP/s in float32 over those in bfloat16, one thread, forward
and backward, torch 2.13, are 0.5 with AVX-512 BF16, less with AMX, 2.4 with AVX-512 alone and 15 and more with AVX2.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from components.config.ray import MatmulDtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CLEARLY = 1.2
"""Float32 must be this many times as fast: far from every ratio above, so that no noise of a busy machine decides."""
ROWS = 128
"""About a micro-batch of short records."""
SMALLEST, LARGEST = 512, 1024
"""Bounds of the outputs and inputs that are measured: starting a smaller product takes most of its time, and for a
larger one the slowest processors take seconds."""
REPEATS = 2, 6
BUDGET_S = 0.3
"""Fewest and most measurements of each dtype, alternating; beyond the fewest, only while the budget lasts."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a linear layer, forward and backward, on the threads that this process has."""

    bfloat16: float
    float32: float

    @property
    def faster(self) -> MatmulDtype:
        """What to multiply in."""
        return "float32" if self.float32 > CLEARLY * self.bfloat16 else "bfloat16"


def agreed(shape: tuple[int, int]) -> Rates:
    """What all workers of a gloo group can count on; each of them must call it. `shape` as `typical_shape` says."""
    measured: list[Rates] = [measure(shape)] * dist.get_world_size()
    dist.all_gather_object(measured, measured[0])
    return slowest(measured)


def slowest(measured: Sequence[Rates]) -> Rates:
    """The rates that a group of workers can count on."""
    return Rates(min(rates.bfloat16 for rates in measured), min(rates.float32 for rates in measured))


def measure(shape: tuple[int, int]) -> Rates:
    """Both rates here and now, for a layer of so many outputs and inputs: the best of a few alternating measurements.

    Of one thread its own processor time counts, so that what else runs on the machine does not decide. Takes some
    20 ms, and on the slowest processors half a second.
    """
    from ray_jobs.kernels import float32_layers

    outputs, inputs = (min(max(size, SMALLEST), LARGEST) for size in shape)
    x = torch.randn(ROWS, inputs).bfloat16().requires_grad_()
    weight = torch.randn(outputs, inputs).bfloat16()
    gradient = torch.randn(ROWS, outputs).bfloat16()
    best = [math.inf, math.inf]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = time.perf_counter()
    for repeat in range(REPEATS[1]):
        for index, linear in enumerate((torch.nn.functional.linear, float32_layers.linear)):
            started = clock()
            linear(x, weight).backward(gradient)
            best[index] = min(best[index], clock() - started)
        if repeat + 1 >= REPEATS[0] and time.perf_counter() - began > BUDGET_S:
            break
    operations = 2 * 2 * ROWS * outputs * inputs
    rates = Rates(bfloat16=operations / best[0], float32=operations / best[1])
    logger.debug("products here: %.3g FLOP/s in bfloat16, %.3g in float32", rates.bfloat16, rates.float32)
    return rates


def typical_shape(base: "PretrainedConfig") -> tuple[int, int]:
    """Outputs and inputs of the layer that most of a base's time goes into: its feed-forward's first."""
    text = base.get_text_config()  # of a model that also sees, what reads and writes
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.hidden_size
