"""Float32 products by oneDNN in place of a BLAS, where that is faster and as exact.

PyTorch gives float32 products to MKL, which does not use the AVX-512 of AMD's processors. oneDNN does: 461 GFLOP/s in
place of 205 on two cores of an EPYC (torch 2.13, 320 x 576 by 576 x 3072). PyTorch calls it where
operands may be rounded to bfloat16, a permission that oneDNN uses with AMX alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from components.shared.cpus import this_cpu


@contextmanager
def by_onednn(*, may_round: bool = False) -> Iterator[None]:
    """Within, oneDNN computes float32 products where that pays; where they `may_round` operands, wherever it can."""
    if not may_round and not pays():
        yield
        return
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def pays() -> bool:
    """Whether oneDNN takes float32 products faster than what PyTorch has for them, and as exactly.

    Not measured, but known from the processor: a training that is resumed is to take the same sums as before.
    """
    cpu = this_cpu()
    return cpu.name.startswith("AMD") and cpu.kind != "AMX" and torch.backends.cpu.get_cpu_capability() == "AVX512"
