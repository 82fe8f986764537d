"""The interface to the kernels: choose the dtype of products, adopt a model's layers, and restore them.

Who runs a model chooses once (`choose`, `agree`), loads with `load_model`, and calls `Kernels.adopt` again once an
adapter is attached; `part` undoes what an adapter's training needs. Who loads a base knows no kernels.
"""

import ctypes
import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from components.config.methods import BaseFormat
from components.config.ray import MatmulDtype
from components.config.schema import ModelConfig, TrainingConfig
from ray_jobs.base import base_model, together
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


# The compute dtype of CPU workers for bfloat16 operands: bfloat16 or float32, whichever is faster on this processor.
#
# Measured, as the list of instruction sets keeps growing. FLOP/s in float32 over those in bfloat16 (one thread, forward
# and backward, torch 2.13) are 0.5 with AVX-512 BF16, less with AMX, 2.4 with AVX-512 alone, and 15 or more with AVX2.

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


def measure(shape: tuple[int, int]) -> float:
    """How many times as fast as in bfloat16 a linear layer of this shape (outputs, inputs) computes in float32 on this
    process's threads, forward and backward: by the best of a few alternating measurements.

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
    return best[0] / best[1]


def typical_shape(base: "PretrainedConfig") -> tuple[int, int]:
    """Outputs and inputs of the layer that takes most of a base's time: the first of its feed-forward block."""
    text = base.get_text_config()  # the text model of a multimodal one
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size, text.hidden_size


Model = TypeVar("Model", bound="nn.Module")


@dataclass(frozen=True)
class Kernels:
    """The dtype in which a process, or every process of a group, computes a model's products on the CPU.

    In either case, weights and activations are the same 16-bit values.
    """

    dtype: MatmulDtype = "bfloat16"

    def adopt(self, model: Model) -> Model:
        """Replace a base's layers, with or without an adapter, by those for these products, in place; idempotent."""
        from peft import PeftModel

        if self.dtype == "float32":
            from ray_jobs.kernels.float32_layers import multiply_in_float32

            multiply_in_float32(model)
        if isinstance(model, PeftModel):
            from ray_jobs.kernels import fused, fused_layer

            fused.adopt(model)
            fused_layer.adopt(model)
        return model

    def hold_dense_if_room(self, model: "nn.Module", *, sharers: int = 1) -> bool:
        """Widen a CPU model's frozen weights to its products' dtype; False if `sharers` processes lack the room."""
        from ray_jobs.kernels import float32_layers

        return float32_layers.widen_if_room(model, self.dtype, sharers=sharers)

    @property
    def linear(self) -> "Callable[..., Tensor]":
        from ray_jobs.kernels import float32_layers

        return float32_layers.linear if self.dtype == "float32" else torch.nn.functional.linear


PLAIN = Kernels()
"""PyTorch's own products, in 16 bits."""


def load_model(
    base: Base, config: ModelConfig, base_format: BaseFormat, kernels: Kernels, **how: Any
) -> "PreTrainedModel":
    """Load a base as `base_model.load_model` does, and adopt `kernels`."""
    return kernels.adopt(base_model.load_model(base, config, base_format, **how))


def adopt_single_rows(model: Model) -> Model:
    """Replace layers of a model that answers one prompt at a time by single-row variants, where these are faster."""
    from ray_jobs.kernels import one_row

    one_row.adopt(model)
    return model


def part(model: "PreTrainedModel") -> None:
    """Restore a base after its adapter is removed: its decoder layers are transformers' own again.

    The layers that read the base's own weights stay: the next use in this process computes its products the same way.
    """
    from ray_jobs.kernels import fused_layer

    fused_layer.part(model)


def choose(config: TrainingConfig, base: "PretrainedConfig", *, on_gpu: bool = False) -> Kernels:
    """Choose this process's kernels, without other workers. For GPU workers they concern only what runs on the CPU."""
    if on_gpu:
        return PLAIN
    return _fixed(config) or faster([measure(typical_shape(base))])


def agree(config: TrainingConfig, base: "PretrainedConfig") -> Kernels:
    """Choose kernels for all workers of a gloo group, which all must call this."""
    return _fixed(config) or faster(together.all_gather(measure(typical_shape(base))))


def _fixed(config: TrainingConfig) -> Kernels | None:
    wanted = config.ray.cpu_matmul_dtype
    return None if wanted == "auto" else Kernels(wanted)


def faster(measured: Sequence[float]) -> Kernels:
    """The kernels for processes that have `measure`d this: in float32 where one of them is slow in bfloat16."""
    return Kernels("float32" if max(measured) > CLEARLY else "bfloat16")


# Keep freed memory in the process, so that the next training step reuses it.
#
# glibc returns large blocks to the system, which hands them out again as zeroed pages: about 2,000 page faults per
# layer of the example's base in each step, a tenth of the step's time.

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_BYTES = 2**31 - 1
LARGEST_BLOCK = 2**30


def keep_freed_memory() -> None:
    """Enable this for the whole process; does nothing where the C library is not glibc. Peak memory does not change."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_BYTES)


def give_back() -> None:
    """Return memory that this process has freed to the system, and to the GPU, so that it counts as free there."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
