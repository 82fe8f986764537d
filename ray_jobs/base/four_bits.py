"""Four-bit weights on processors, quantised to the bit as bitsandbytes does it, and more than ten times as fast.

bitsandbytes 0.50 has a kernel for GPUs; on processors it looks for each weight by bisection among the midpoints of its
16 numbers (backends/default/ops.py), 20 to 30 ns a weight: minutes for 7 billion of them, in every worker. Here all
weights of a block that fits the cache are compared with one midpoint after the other, and a weight's place among the
numbers is the count of midpoints below it.
"""

from collections.abc import Callable

import bitsandbytes.functional
import numpy as np
import numpy.typing as npt
import torch

OPERATION = "bitsandbytes::quantize_4bit"
PIECE = 2**17
"""Weights taken at a time, a multiple of every size of block: their float32 numbers fill half a MiB."""
SMALLEST = 1e-38
"""What a block's largest weight counts as where it is less."""


def register() -> None:
    """Have bitsandbytes quantise this way on processors from now on, unless it has a kernel for them itself."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        torch.library.register_kernel(OPERATION, "cpu", quantize_4bit)


def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places among the numbers of `quant_type` ("nf4", "fp4"), two in a byte, the first in its upper half, and the
    largest absolute value of each block, float32 (blocks,).

    A is of 16 or 32 bits; the last of its blocks may be short. The first has shape (B, 1) with B as many elements of
    `quant_storage` as its bytes fill.
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
    if len(places) > whole:  # by division, and an odd number of them with a zero behind, as bitsandbytes has it
        rest = flat[whole:].float()
        largest.append(rest.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST))
        scaled = torch.clamp(rest / largest[-1], -1, 1)
        places[whole:] = places_of(torch.nn.functional.pad(scaled, (0, len(places) - len(flat))).numpy())
    pairs = places.view("<u2")  # the first place in the lower byte
    packed = torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(np.uint8))
    return packed.view(quant_storage).unsqueeze(1), torch.cat(largest)


def _places(quant_type: str) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.uint8]]:
    """A function from float32 numbers to the places of those of `quant_type` next to them."""
    code = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(code)
    midpoints = ((code[order[:-1]] + code[order[1:]]) / 2).numpy()
    in_code = order.numpy().astype(np.uint8)
    is_sorted = bool((in_code == np.arange(len(in_code))).all())

    def places(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        found, is_less = np.zeros(len(numbers), np.uint8), np.empty(len(numbers), np.bool_)
        for midpoint in midpoints:
            np.less(midpoint, numbers, out=is_less)
            found += is_less.view(np.uint8)
        return found if is_sorted else in_code[found]

    return places
