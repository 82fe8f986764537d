"""DoRA: LoRA's direction with a magnitude of each output (arXiv:2402.09353, equation 5), in float32 where it matters.

    W' = m * (W + s B A) / ||W + s B A||_c

Training moves m / norm away from one by a few thousandths, and near one bfloat16 has steps of 0.4 to 0.8 % only:
stored or divided in it, most of what m learned would be lost. So norm and ratio are computed in float32. While m is
trained, which DeepSpeed does in 16 bits with float32 masters, its parameter holds the difference from its start, a
small number that 16 bits represent well enough; the start is kept beside it in float32. m itself is saved, in float32.

Shapes: I input, O output, R rank, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ray_jobs.base.gathered import gathered

NAMES = ("lora_magnitude_vector", "vera_lambda_m")
"""What peft calls a magnitude, of LoRA's kind and of VeRA's."""


class DoraLinearLayer(dora.DoraLinearLayer):
    """What DoRA adds beside LoRA's factors; takes the place of peft's class of the same name."""

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
        """What is added to the base's result: (..., I) to (..., O), in the wider type of `x` and the base's result."""
        if base_result is None:  # dropout reaches both terms, as in DoRA's own code
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        direction = lora_B(lora_A(x))
        scale_O = ratio(whole(self.weight), self.norm(base_layer, lora_A, lora_B, scaling))
        change = (scale_O - 1).to(base_result.dtype) * base_result
        return change + scale_O.to(direction.dtype) * direction * scaling

    @torch.no_grad()
    def norm(self, base_layer: Any, lora_A: Any, lora_B: Any, scaling: float) -> Tensor:
        """||W + s B A||_c, shape (O,), in float32 and outside the graph (section 4.3)."""
        weight = wide(dora.dequantize_module_weight(base_layer))
        weight_OI = weight.T if self.fan_in_fan_out else weight
        return row_norm(weight_OI, wide(lora_A.weight), scaling * wide(lora_B.weight))


def adopt(model: nn.Module) -> None:
    """Turn peft's DoRA layers into those above; what is one already stays."""
    for module in model.modules():
        if type(module) is dora.DoraLinearLayer:
            module.__class__ = DoraLinearLayer


@torch.no_grad()
def start_at_the_norm(model: nn.Module) -> None:
    """Give a fresh adapter's magnitudes the norm in float32, so that the model is the base to the last bit.

    peft rounds it to the base's type. Under ZeRO-3 every worker must call it.
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
    """The magnitudes of a model's adapters that are trained; none but with DoRA and DVoRA."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(known in name for known in NAMES):
            yield parameter


def train_as_change(model: nn.Module, dtype: torch.dtype) -> None:
    """Let each magnitude's parameter hold, in `dtype`, the change from what it is now."""
    for parameter in magnitudes(model):
        parameter.start = wide(parameter.detach())
        parameter.data = torch.zeros_like(parameter, dtype=dtype)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Let each magnitude's parameter hold the magnitude itself again, in float32."""
    for parameter in magnitudes(model):
        parameter.data = whole(parameter)
        parameter.start = None


def whole(magnitude: Tensor) -> Tensor:
    """m, shape (O,), at least in float32, of a parameter that holds it or its change."""
    start = getattr(magnitude, "start", None)
    return wide(magnitude) if start is None else start.to(magnitude.device) + wide(magnitude)


def ratio(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """m / norm; of a row of zeros, whose m is zero too, nothing is divided by zero."""
    return magnitude_O / norm_O.clamp_min(torch.finfo(norm_O.dtype).tiny)


def row_norm(weight_OI: Tensor, lora_A_RI: Tensor | None = None, lora_B_OR: Tensor | None = None) -> Tensor:
    """||W + B A||_c or ||W||_c, shape (O,), summed at least in float32; the product is in the wider of their types."""
    if lora_A_RI is not None and lora_B_OR is not None:
        dtype = torch.promote_types(weight_OI.dtype, lora_A_RI.dtype)
        weight_OI = torch.addmm(weight_OI.to(dtype), lora_B_OR.to(dtype), lora_A_RI.to(dtype))
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.promote_types(weight_OI.dtype, torch.float32))


def wide(tensor: Tensor) -> Tensor:
    """The tensor, at least in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
