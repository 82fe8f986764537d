"""DoRA: a LoRA update with a learned magnitude for each output (arXiv:2402.09353, equation 5), in float32 where needed.

    W' = m * (W + s B A) / ||W + s B A||_c

Training moves m / norm away from one by a few thousandths, and bfloat16 has steps of 0.4 to 0.8 % near one: it would
lose most of what m learned. So norm and ratio are computed in float32, and m is saved in it. While DeepSpeed trains m
in 16 bits, the parameter holds the difference from m's start value, which is kept beside it in float32.

Shapes: I input, O output, R rank, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ray_jobs.base.four_bits import gathered

NAMES = ("lora_magnitude_vector", "vera_lambda_m")
"""Names of the magnitude parameters in peft's DoRA layers and in this repository's DVoRA layers."""


class DoraLinearLayer(dora.DoraLinearLayer):
    """The DoRA part of a LoRA layer; replaces peft's class of the same name."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """The term added to the base's result: (..., I) to (..., O), in the wider dtype of `x` and that result."""
        if base_result is None:  # dropout applies to both terms, as in the DoRA authors' code
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        direction = lora_B(lora_A(x))
        scale_O = ratio(whole(self.weight), self.norm(base_layer, lora_A, lora_B, scaling))
        change = (scale_O - 1).to(base_result.dtype) * base_result
        return change + scale_O.to(direction.dtype) * direction * scaling

    @torch.no_grad()
    def norm(self, base_layer: Any, lora_A: Any, lora_B: Any, scaling: float) -> Tensor:
        """||W + s B A||_c, shape (O,), in float32 and outside the autograd graph (section 4.3)."""
        weight = wide(dora.dequantize_module_weight(base_layer))
        weight_OI = weight.T if self.fan_in_fan_out else weight
        return row_norm(weight_OI, wide(lora_A.weight), scaling * wide(lora_B.weight))


def adopt(model: nn.Module) -> None:
    """Replace peft's DoRA layers in the model by `DoraLinearLayer`; those replaced already stay."""
    for module in model.modules():
        if type(module) is dora.DoraLinearLayer:
            module.__class__ = DoraLinearLayer


@torch.no_grad()
def start_at_the_norm(model: nn.Module) -> None:
    """Set the magnitudes of a fresh adapter to the float32 norm, so that the model equals the base to the last bit.

    peft rounds the norm to the base's dtype. Under ZeRO-3 every worker must call this.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, magnitude in layer.lora_magnitude_vector.items():
                if isinstance(magnitude, DoraLinearLayer):
                    base_layer = layer.get_base_layer()
                    with gathered(base_layer.parameters()):
                        norm = magnitude.norm(base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
                    magnitude.weight.data = norm.to(magnitude.weight.device)


def magnitudes(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable magnitudes of a model's adapters; empty unless the method is DoRA or DVoRA."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in NAMES):
            yield parameter


def train_as_change(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each magnitude parameter by its change from the current value, zeros in `dtype`."""
    for parameter in magnitudes(model):
        parameter.start = wide(parameter.detach())
        parameter.data = torch.zeros_like(parameter, dtype=dtype)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Turn each magnitude parameter back from the change to the magnitude itself, in float32."""
    for parameter in magnitudes(model):
        parameter.data = whole(parameter)
        parameter.start = None


def whole(magnitude: Tensor) -> Tensor:
    """m, shape (O,), in float32 or wider, from a parameter that holds either m or its change."""
    start = getattr(magnitude, "start", None)
    return wide(magnitude) if start is None else start.to(magnitude.device) + wide(magnitude)


def ratio(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """m / norm, without division by zero for a row of zeros, whose m is zero too."""
    return magnitude_O / norm_O.clamp_min(torch.finfo(norm_O.dtype).tiny)


def row_norm(weight_OI: Tensor, lora_A_RI: Tensor | None = None, lora_B_OR: Tensor | None = None) -> Tensor:
    """||W + B A||_c or ||W||_c, shape (O,), summed in float32 or wider; B A is added in the wider of the two dtypes."""
    if lora_A_RI is not None and lora_B_OR is not None:
        dtype = torch.promote_types(weight_OI.dtype, lora_A_RI.dtype)
        weight_OI = torch.addmm(weight_OI.to(dtype), lora_B_OR.to(dtype), lora_A_RI.to(dtype))
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.promote_types(weight_OI.dtype, torch.float32))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
