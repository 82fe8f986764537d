"""Float32 matrix products by oneDNN instead of a BLAS, where that is faster and as exact.

PyTorch uses MKL for float32 products, which does not use AVX-512 on AMD processors. oneDNN does: 461 GFLOP/s instead of
205 on two cores of an EPYC (torch 2.13, 320 x 576 by 576 x 3072). PyTorch calls oneDNN only where operands may be
rounded to bfloat16, a permission that oneDNN uses only with AMX.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from components.shared.cpus import this_cpu


@contextmanager
def by_onednn(*, may_round: bool = False) -> Iterator[None]:
    """Within, use oneDNN for float32 products where it is faster; with `may_round`, wherever PyTorch can use it."""
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
    """Whether oneDNN computes float32 products faster than PyTorch's default, and as exactly.

    Derived from the processor, not measured: a resumed training must compute the same sums as before.
    """
    cpu = this_cpu()
    return cpu.name.startswith("AMD") and cpu.kind != "AMX" and torch.backends.cpu.get_cpu_capability() == "AVX512"
