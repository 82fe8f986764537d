"""Layers that store low-precision weights and multiply in float32, for CPUs that multiply bfloat16 slowly.

The operands of each product are converted to float32, and the result is rounded once to the dtype of the input: never
less precise than a bfloat16 product. Each class replaces the class of the same name in torch, transformers or
bitsandbytes; peft checks that name.

Shapes: I input, O output, R rank. A mixture's stacked experts stay as they are.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import bitsandbytes
import peft.tuners.vera.layer
import torch
import torch.nn.functional as F
import transformers.pytorch_utils
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor

from components.config.ray import MatmulDtype
from components.shared.machine import available_bytes, this_cpu
from ray_jobs.adapters import dvora
from ray_jobs.base.four_bits import dequantize_4bit, gathered

# Float32 matrix products by oneDNN instead of a BLAS, where that is faster and as exact.
#
# PyTorch uses MKL for float32 products, which does not use AVX-512 on AMD processors. oneDNN does: 461 GFLOP/s instead
# of 205 on two cores of an EPYC (torch 2.13, 320 x 576 by 576 x 3072). PyTorch calls oneDNN only where operands may be
# rounded to bfloat16, a permission that oneDNN uses only with AMX.


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


# Elements of a weight that are converted at a time: 4 MiB in float32, about what the caches of one core hold.
BLOCK_ELEMENTS = 2**20

Blocks = Callable[[Tensor], Iterator[tuple[slice, Tensor]]]
"""A function that yields a weight's rows in float32: their slice, and their values (rows, I)."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of x (..., I), W (O, I) and b (O,), in the dtype of x; differentiable in all three."""
    if torch.promote_types(input.dtype, weight.dtype) is torch.float64:
        wide = torch.float64
        return F.linear(input.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(input.dtype)
    product: Tensor = Product.apply(input, weight, bias, weight.shape[0], _dense_blocks)
    return product


class Product(torch.autograd.Function):
    """x W^T + b for a W in any storage format. Saves `x` in its own dtype for backward, and no float32 copy of W."""

    @staticmethod
    @by_onednn()
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias_O: Tensor | None, num_outputs: int, blocks: Blocks) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.blocks = weight, blocks  # the parameter itself, as ZeRO-3 replaces its data
        ctx.num_inputs = x.shape[-1]
        wide_x = x.float()
        out = x.new_empty(*x.shape[:-1], num_outputs)
        for rows, wide_rows in blocks(weight):
            out[..., rows] = F.linear(wide_x, wide_rows, None if bias_O is None else bias_O[rows].float())
        return out

    @staticmethod
    @by_onednn()
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        wide_gradient = gradient.float().reshape(-1, gradient.shape[-1])
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            wide = wide_gradient.new_zeros(len(wide_gradient), ctx.num_inputs)
            with gathered([weight] if not weight.numel() else []):
                for rows, wide_rows in ctx.blocks(weight):
                    wide.addmm_(wide_gradient[:, rows], wide_rows)
            x_gradient = wide.to(gradient.dtype).view(*gradient.shape[:-1], ctx.num_inputs)
        if ctx.needs_input_grad[1]:
            weight_gradient = (wide_gradient.T @ x.reshape(-1, ctx.num_inputs).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias_gradient = wide_gradient.sum(0).to(gradient.dtype)
        return x_gradient, weight_gradient, bias_gradient, None, None


class Linear(torch.nn.Linear):
    """A linear layer of a 16-bit base, its head, or a LoRA factor."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Conv1D(transformers.pytorch_utils.Conv1D):
    """GPT-2's linear layer, whose weight is (I, O)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


class _Quantised(torch.nn.Module):
    """A bitsandbytes layer whose weight is dequantised for each product."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Product.apply(x, self.weight, self.bias, self.out_features, reader(self))
        return product


class Linear4bit(_Quantised, bitsandbytes.nn.Linear4bit):
    """A layer with NF4 or FP4 weights, dequantised to float32 for each product."""


class Linear8bitLt(_Quantised, bitsandbytes.nn.Linear8bitLt):
    """A layer with int8 weights; inputs are never rounded to int8, even in evaluation."""


def reader(layer: Any) -> Blocks | None:
    """The function that reads the weight of a layer defined above, or of its bitsandbytes class; None for others."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        fix_4bit_weight_quant_state_from_module(layer)
        state = layer.weight.quant_state
        # To 16 bits first: exactly the weights that an export dequantises and that other devices multiply with.
        return lambda weight: _dense_blocks(dequantize_4bit(weight, state))
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        scale_O = layer.state.SCB
        # Bit-identical to how peft dequantises for magnitudes, and an export for its weights.
        return lambda weight: ((rows, int8_vectorwise_dequant(weight[rows], scale_O[rows])) for rows in _rows(weight))
    return _dense_blocks if isinstance(layer, Linear) else None


class VeraLinear(peft.tuners.vera.layer.Linear):
    """A linear layer with VeRA adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with its active adapters: (..., I) to (..., O), in the dtype of `x`."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.vera_lambda_d:
                b_O, d_R = self.vera_lambda_b[adapter], self.vera_lambda_d[adapter]
                A_RI, B_OR = dvora.shared_matrices(self, adapter)
                x_R = linear(self.vera_dropout[adapter](self._cast_input_dtype(x, d_R.dtype)), A_RI)
                result = result + b_O * linear(d_R * x_R, B_OR)
        return result.to(x.dtype)


class DvoraLinear(dvora.DvoraLinear):
    """A linear layer with DVoRA adapters."""

    linear = staticmethod(linear)

    def _frozen_weight(self) -> Tensor:
        return super()._frozen_weight().float()  # float32, so the product that the norm is computed from is too


LAYERS: dict[type, type] = {
    torch.nn.Linear: Linear,
    transformers.pytorch_utils.Conv1D: Conv1D,
    bitsandbytes.nn.Linear4bit: Linear4bit,
    bitsandbytes.nn.Linear8bitLt: Linear8bitLt,
    peft.tuners.vera.layer.Linear: VeraLinear,
    dvora.DvoraLinear: DvoraLinear,
}


def multiply_in_float32(model: torch.nn.Module) -> None:
    """Replace the classes of a model's layers as LAYERS says; layers replaced already stay."""
    for module in model.modules():
        module.__class__ = LAYERS.get(type(module), type(module))


def _dense_blocks(weight_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for rows in _rows(weight_OI):  # float32 weights too, for the same sums as from 16 bits
        yield rows, weight_OI[rows].float()


def _rows(weight_OI: Tensor) -> Iterator[slice]:
    num_outputs, num_inputs = weight_OI.shape
    step = max(1, BLOCK_ELEMENTS // num_inputs)
    for start in range(0, num_outputs, step):
        yield slice(start, start + step)


# Converting a frozen base's weights once to the dtype of its matrix products, instead of before each product.
#
# Generation takes a forward pass per token, and dequantising 4-bit weights is most of such a pass; in a training step
# it is a fifth. The converted weights are exactly those that each pass would compute.

logger = logging.getLogger(__name__)

DTYPES: dict[MatmulDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_SHARE = 0.5
"""Share of the free memory that dense weights may take; the rest is for the KV cache and activations."""


def widen(model: torch.nn.Module, products: MatmulDtype) -> None:
    """Turn the frozen layers of a model on the CPU into dense ones, in place; an adapter's trained layers stay.

    `products` is the dtype of the matrix products. Outputs are the same up to the order of summation. An int8 base with
    products in bfloat16 stays as it is: there bitsandbytes rounds inputs to int8 as well.
    """
    dtype = DTYPES[products]
    for layer in _layers(model, dtype):
        blocks = reader(layer)
        assert blocks is not None
        with torch.no_grad():
            dense = torch.cat([rows.to(dtype) for _, rows in blocks(layer.weight)])
        weight = torch.nn.Parameter(dense, requires_grad=False)
        layer.__class__ = Linear if dtype is torch.float32 else torch.nn.Linear
        layer.weight = weight


def widen_if_room(model: torch.nn.Module, products: MatmulDtype, *, sharers: int = 1) -> bool:
    """Call `widen` if the free memory, shared by `sharers` processes here, allows it; returns whether it did."""
    dtype = DTYPES[products]
    num_weights = sum(layer.in_features * layer.out_features for layer in _layers(model, dtype))
    if num_weights * dtype.itemsize > MEMORY_SHARE * available_bytes() / sharers:
        logger.info("the base is read as it is stored: free memory has no room for %d dense weights", num_weights)
        return False
    widen(model, products)
    return num_weights > 0


def _layers(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    """The frozen layers on the CPU that are not dense in this dtype."""
    kinds: tuple[type, ...] = (bitsandbytes.nn.Linear4bit,)
    if dtype is torch.float32:
        kinds = (*kinds, bitsandbytes.nn.Linear8bitLt, Linear)
    for module in model.modules():
        layer: Any = module
        is_dense = isinstance(layer, Linear) and layer.weight.dtype is dtype
        if not issubclass(type(layer), kinds) or is_dense:
            continue
        if layer.weight.device.type == "cpu" and not layer.weight.requires_grad:
            yield layer
