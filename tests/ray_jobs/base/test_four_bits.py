"""Four bits by the kernel for processors, against bitsandbytes' own and against what arXiv:2305.14314 says of NF4."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import get_4bit_type

from components.shared.errors import JobError
from ray_jobs.base import four_bits

BY_BITSANDBYTES = """
import itertools, torch, bitsandbytes
from ray_jobs.base import four_bits

theirs, ours = torch.ops.bitsandbytes.quantize_4bit.default, four_bits.quantize_4bit
draw = torch.Generator().manual_seed(0)
shapes = [(64,), (65,), (7, 9), (300, 1000), (64, 4096)]  # whole blocks and short ones, odd numbers, several pieces
for shape, dtype, kind, size, storage in itertools.product(
    shapes, (torch.bfloat16, torch.float16, torch.float32), ("nf4", "fp4"), (64, 4096), (torch.uint8, torch.bfloat16)
):
    weight = (0.05 * torch.randn(shape, generator=draw)).to(dtype)
    weight.view(-1)[:32] = 0
    weight.view(-1)[32:40] = 1e-40
    outcome = []
    for quantize in (theirs, ours):
        try:
            packed, largest = quantize(weight, size, kind, storage)
            kinds = packed.shape, packed.dtype, largest.dtype
            outcome.append((kinds, packed.view(torch.uint8).numpy().tobytes(), largest.numpy().tobytes()))
        except RuntimeError as exc:  # an odd number of bytes is no bfloat16
            outcome.append(str(exc))
    assert outcome[0] == outcome[1], (shape, dtype, kind, size, storage)
four_bits.register()
four_bits.register()
weight = torch.nn.Parameter(0.05 * torch.randn(128, 128))
assert torch.equal(theirs(weight, 64, "nf4", torch.uint8)[0], ours(weight.data, 64, "nf4", torch.uint8)[0])
print("done")
"""


@pytest.mark.slow
def test_it_finds_what_bitsandbytes_own_finds_to_the_bit():
    """In a process of its own: once there is a kernel for processors, theirs cannot be called any more."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BY_BITSANDBYTES], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stderr


def test_each_weight_becomes_the_nearest_number_times_the_largest_of_its_64():
    weight = torch.randn(40, 4096, generator=torch.Generator().manual_seed(1))
    packed, largest = four_bits.quantize_4bit(weight, 64, "nf4", torch.uint8)
    blocks = weight.numpy().astype(np.float64).reshape(-1, 64)
    np.testing.assert_array_equal(largest.numpy(), np.abs(blocks).max(axis=1))
    code = get_4bit_type("nf4", device="cpu").numpy().astype(np.float64)
    nearest = np.abs((blocks / np.abs(blocks).max(axis=1, keepdims=True))[..., None] - code).argmin(axis=-1).reshape(-1)
    found = np.stack([packed.numpy().reshape(-1) >> 4, packed.numpy().reshape(-1) & 15], axis=1).reshape(-1)
    # In float32 as in float64, but for what lies within a rounding of the middle between two numbers.
    assert (found != nearest).mean() < 1e-6


def test_a_weight_is_not_dequantised_with_statistics_on_another_device():
    packed, state = functional.quantize_4bit(torch.randn(16, 64).bfloat16(), quant_type="nf4")
    state.to("meta")
    with pytest.raises(JobError, match=r"shape \(16, 64\) is on cpu and its statistics are on meta"):
        four_bits.dequantize_4bit(packed, state)
