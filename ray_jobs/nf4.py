"""The product with a 4-bit weight, for weights that ZeRO-3 shards.

bitsandbytes keeps the gathered weight from the forward to the backward pass, so that every worker would hold the whole
base once in each step (0.50, autograd/_functions.py, MatMul4Bit), and checkpointing activations would not help: it is
kept where autograd does not see it. Here a layer's weight is gathered again for its backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ray_jobs import deepspeed


@contextmanager
def letting_go() -> Iterator[None]:
    """Within, bitsandbytes' 4-bit layers compute with `Product`."""
    import bitsandbytes

    keeping = bitsandbytes.matmul_4bit

    def matmul_4bit(x: torch.Tensor, weight: Any, quant_state: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = Product.apply(x, weight, quant_state, keeping)
        return product if bias is None else product + bias

    bitsandbytes.matmul_4bit = matmul_4bit
    try:
        yield
    finally:
        bitsandbytes.matmul_4bit = keeping


class Product(torch.autograd.Function):
    """x W^T for a frozen 4-bit W: x (..., I) to (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, quant_state: Any, matmul_4bit: Any) -> torch.Tensor:
        ctx.weight, ctx.quant_state = weight, quant_state  # the parameter: its data come and go
        product: torch.Tensor = matmul_4bit(x, weight, quant_state=quant_state)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        with deepspeed.whole([ctx.weight] if not ctx.weight.numel() else []):
            weight = dequantize_4bit(ctx.weight.data, ctx.quant_state)
        return gradient @ weight.to(gradient.dtype), None, None, None
