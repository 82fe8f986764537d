"""LoRA on a frozen layer as one product with a single backward pass: y = x W^T + b + s (x A^T) B^T.

peft computes it in eight steps and rounds four times; here base and update are rounded once, together. `adapted` says
what still goes peft's way. On GPUs that is all without gradients: in generation bitsandbytes multiplies single tokens
directly with 4-bit weights.

Shapes: I input, O output, R rank, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import bitsandbytes
import peft.tuners.lora.bnb
import peft.tuners.lora.layer
import torch
from torch import Tensor, nn

from ray_jobs.base.four_bits import dequantize_4bit
from ray_jobs.kernels import float32_layers
from ray_jobs.kernels.float32_layers import Blocks

HALF = (torch.bfloat16, torch.float16)


class LoraProduct(torch.autograd.Function):
    """The product above for a frozen W in any storage format, computed in `dtype`; saves x and x A^T for backward."""

    @staticmethod
    @float32_layers.by_onednn()
    def forward(
        ctx: Any,
        x: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        weight: Tensor,
        bias_O: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        blocks: Blocks,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        y = x_TI.new_empty(*x.shape[:-1], len(B_OR))  # not a view: Llama 4 adds to it in place
        y_TO = y.view(-1, len(B_OR))
        for rows, weight_rows in blocks(weight):
            torch.mm(x_TI, weight_rows.T, out=y_TO[:, rows])
        if bias_O is not None:
            y_TO += bias_O
        h_TR = x_TI @ A_RI.to(dtype).T
        y_TO.addmm_(h_TR, B_OR.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x, A_RI, B_OR, h_TR)
        ctx.weight, ctx.scaling, ctx.blocks = weight, scaling, blocks
        return y.to(x.dtype)

    @staticmethod
    @float32_layers.by_onednn()
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, B_OR, h_TR = ctx.saved_tensors
        dtype = h_TR.dtype
        g_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        g_TR = (g_TO @ B_OR.to(dtype)).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            g_TI = g_TR @ A_RI.to(dtype)
            for rows, weight_rows in ctx.blocks(ctx.weight):
                g_TI.addmm_(g_TO[:, rows], weight_rows)
            x_gradient = g_TI.to(x.dtype).view(x.shape)
        A_gradient = g_TR.T @ x.reshape(-1, x.shape[-1]).to(dtype)
        B_gradient = (g_TO.T @ h_TR).mul_(ctx.scaling)
        return x_gradient, A_gradient.to(A_RI.dtype), B_gradient.to(B_OR.dtype), None, None, None, None, None


class _Fused(nn.Module):
    """One of peft's LoRA layers, computed as one product where that covers it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora = None if args or kwargs else adapted(self, x)
        if lora is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        product: Tensor = LoraProduct.apply(
            x, lora.A, lora.B, lora.weight, lora.bias, lora.scaling, lora.dtype, lora.blocks
        )
        return product


class Linear(_Fused, peft.tuners.lora.layer.Linear):
    """A dense layer with LoRA."""


class Linear4bit(_Fused, peft.tuners.lora.bnb.Linear4bit):
    """A 4-bit layer with LoRA."""


class Linear8bitLt(_Fused, peft.tuners.lora.bnb.Linear8bitLt):
    """An int8 layer with LoRA."""


@dataclass(frozen=True)
class Adapted:
    """A frozen layer and its LoRA factors, as operands of the product above."""

    weight: Tensor
    bias: Tensor | None
    blocks: Blocks
    A: Tensor
    B: Tensor
    scaling: float
    dtype: torch.dtype
    """Compute dtype of the products."""


LAYERS: dict[type, type] = {
    peft.tuners.lora.layer.Linear: Linear,
    peft.tuners.lora.bnb.Linear4bit: Linear4bit,
    peft.tuners.lora.bnb.Linear8bitLt: Linear8bitLt,
}


def adopt(model: nn.Module) -> None:
    """Replace peft's LoRA layers in the model by the classes above; those replaced already stay."""
    for module in model.modules():
        module.__class__ = LAYERS.get(type(module), type(module))


def adapted(layer: Any, x: Tensor) -> Adapted | None:
    """The operands of a layer's product with such an input; None where peft's own forward must be used."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or x.dtype not in HALF:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    base, A_RI, B_OR = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    is_float32 = type(base) in float32_layers.LAYERS.values()
    blocks = float32_layers.reader(base) if is_float32 else _reader_in_half(base)
    if blocks is None or A_RI.dtype != x.dtype or hasattr(A_RI, "ds_id"):
        return None
    if x.device.type != "cpu" and not torch.is_grad_enabled():
        return None
    if "forward" in vars(base) or base._forward_pre_hooks or base._forward_hooks:  # they rely on the call
        return None
    return Adapted(
        base.weight, base.bias, blocks, A_RI, B_OR, layer.scaling[name], torch.float32 if is_float32 else x.dtype
    )


def _reader_in_half(base: Any) -> Blocks | None:
    """The function that reads a torch or bitsandbytes layer's weight; None for int8, which is multiplied otherwise."""
    if type(base) is nn.Linear:
        return lambda weight: iter([(slice(None), weight)])
    if type(base) is bitsandbytes.nn.Linear4bit:
        state, dtype = base.weight.quant_state, base.compute_dtype
        return lambda weight: iter([(slice(None), dequantize_4bit(weight, state).to(dtype))])
    return None
