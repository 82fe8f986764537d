"""The compute dtype of CPU workers for bfloat16 operands: bfloat16 or float32, whichever is faster on this processor.

Measured in milliseconds rather than looked up: the list of instruction sets keeps growing, and PyTorch's kernels for
them change. The ratios are far from the threshold: FLOP/s in float32 over those in bfloat16 (one thread, forward and
backward, torch 2.13) are 0.5 with AVX-512 BF16, less with AMX, 2.4 with AVX-512 alone, and 15 or more with AVX2.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from components.config.ray import MatmulDtype
from ray_jobs.base import together

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CLEARLY = 1.2
"""How many times as fast float32 must be to be chosen: far from all ratios above, so that noise does not decide."""
ROWS = 128
"""Rows of the measured product, about a micro-batch of short records."""
SMALLEST, LARGEST = 512, 1024
"""Bounds of the measured outputs and inputs: smaller products are dominated by launch overhead, and larger ones take
seconds on the slowest processors."""
REPEATS = 2, 6
BUDGET_S = 0.3
"""Minimum and maximum number of measurements per dtype, alternating; beyond the minimum only within BUDGET_S."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a linear layer, forward and backward, on this process's threads."""

    bfloat16: float
    float32: float

    @property
    def faster(self) -> MatmulDtype:
        """The dtype to multiply in."""
        return "float32" if self.float32 > CLEARLY * self.bfloat16 else "bfloat16"


def agreed(shape: tuple[int, int]) -> Rates:
    """The slowest worker's rates in a gloo group; every worker must call this. For `shape` see `typical_shape`."""
    return slowest([Rates(**rates) for rates in together.all_gather(asdict(measure(shape)))])


def slowest(measured: Sequence[Rates]) -> Rates:
    """The lowest rate of any worker, for each dtype."""
    return Rates(min(rates.bfloat16 for rates in measured), min(rates.float32 for rates in measured))


def measure(shape: tuple[int, int]) -> Rates:
    """Measure both rates for a layer of this shape (outputs, inputs): the best of a few alternating measurements.

    With one thread, its own CPU time is measured, so that other load on the machine does not matter. Takes about 20 ms,
    and half a second on the slowest processors.
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
    """Outputs and inputs of the layer that takes most of a base's time: the first of its feed-forward block."""
    text = base.get_text_config()  # the text model of a multimodal one
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.hidden_size
