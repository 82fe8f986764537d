"""Four-bit quantisation on CPUs, bit-identical to that of bitsandbytes and more than ten times as fast.

bitsandbytes 0.50 finds each weight's code by bisection among the 16 code values (backends/default/ops.py), which takes
minutes for 7 billion weights. Here all weights of a piece are compared with one midpoint after the other, and the
number of midpoints below a weight gives its code.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import bitsandbytes.functional
import numpy as np
import numpy.typing as npt
import torch

from components.shared.errors import JobError

OPERATION = "bitsandbytes::quantize_4bit"
PIECE = 2**17
"""Weights processed at a time, a multiple of every block size: half a MiB in float32."""
SMALLEST = 1e-38
"""Lower bound of a block's largest absolute value, against division by zero."""


def register() -> None:
    """Register `quantize_4bit` as bitsandbytes' CPU kernel, unless bitsandbytes has one of its own."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        torch.library.register_kernel(OPERATION, "cpu", quantize_4bit)


def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to 4 bits; returns the packed codes of `quant_type` ("nf4", "fp4"), two per byte with the first in the
    upper half, and the largest absolute value of each block, float32 (blocks,).

    A has 16-bit or 32-bit elements; its last block may be short. The codes have shape (B, 1), where B is their number
    of bytes in elements of `quant_storage`.
    """
    flat = A.detach().reshape(-1)
    whole = len(flat) // blocksize * blocksize
    places_of = _places(quant_type)
    places = np.empty(len(flat) + len(flat) % 2, dtype=np.uint8)
    largest = []
    for start in range(0, whole, PIECE):
        blocks = flat[start : min(start + PIECE, whole)].float().view(-1, blocksize)
        largest.append(blocks.abs().amax(dim=-1))
        scaled = (blocks * (1.0 / largest[-1].clamp(min=SMALLEST)).unsqueeze(-1)).clamp_(-1, 1)
        places[start : start + scaled.numel()] = places_of(scaled.view(-1).numpy())
    if len(places) > whole:  # as bitsandbytes: divided, not multiplied, and padded with a zero to an even number
        rest = flat[whole:].float()
        largest.append(rest.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST))
        scaled = torch.clamp(rest / largest[-1], -1, 1)
        places[whole:] = places_of(torch.nn.functional.pad(scaled, (0, len(places) - len(flat))).numpy())
    pairs = places.view("<u2")  # little-endian, so the first code is in the lower byte
    packed = torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(np.uint8))
    return packed.view(quant_storage).unsqueeze(1), torch.cat(largest)


def dequantize_4bit(weight: torch.Tensor, quant_state: Any) -> torch.Tensor:
    """The weight that these codes and their statistics stand for, as `bitsandbytes.functional.dequantize_4bit`. Raises
    JobError: as in `require_one_device`."""
    require_one_device(weight, quant_state)
    return bitsandbytes.functional.dequantize_4bit(weight.data, quant_state)


def require_one_device(weight: torch.Tensor, quant_state: Any) -> None:
    """Require that a 4-bit weight and its statistics lie on one device.

    bitsandbytes picks its kernel by the weight alone, and one for GPUs would read the statistics' address in host
    memory as one of the GPU's: an illegal memory access, which names no layer (0.50, backends/cuda/ops.py). Raises
    JobError: they lie on different devices.
    """
    if weight.device != quant_state.absmax.device:
        raise JobError(
            f"a 4-bit weight of shape {tuple(quant_state.shape)} is on {weight.device} and its statistics are on "
            f"{quant_state.absmax.device}: they must move together; use a lower train.zero_stage"
        )


def _places(quant_type: str) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.uint8]]:
    """A function that maps float32 numbers to the codes of the nearest values of `quant_type`."""
    code = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(code)
    midpoints = ((code[order[:-1]] + code[order[1:]]) / 2).numpy()
    in_code = order.numpy().astype(np.uint8)
    is_sorted = bool((in_code == np.arange(len(in_code))).all())

    def places(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        ranks, is_less = np.zeros(len(numbers), np.uint8), np.empty(len(numbers), np.bool_)
        for midpoint in midpoints:
            np.less(midpoint, numbers, out=is_less)
            ranks += is_less.view(np.uint8)
        return ranks if is_sorted else in_code[ranks]

    return places


# Gathering weights that ZeRO-3 shards, for as long as they are read.


def gathered(parameters: Iterable[torch.nn.Parameter], *, changes: bool = False) -> AbstractContextManager[None]:
    """Gather the whole weights on every worker, all of which must enter. With `changes`, rank 0's changes are kept."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=0 if changes else None
    )
    return context
