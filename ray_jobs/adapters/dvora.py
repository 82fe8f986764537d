"""DVoRA: DoRA whose direction is updated by VeRA (arXiv:2402.09353, section on DVoRA; VeRA is arXiv:2310.11454).

    W' = m * (W + L_b B L_d A) / ||W + L_b B L_d A||_c

The vectors d, b (from VeRA) and the magnitude m (from DoRA) are trained; A and B are random, frozen and shared by all
layers, each of which takes a slice of them. The norm is over the input dimension, one value per output, and is treated
as a constant in the backward pass (arXiv:2402.09353, section 4.3). At the start b is zero and m the norm of W, so W'
is W.

Importing this module registers the method with peft, so that `PeftModel.from_pretrained` loads it.

Shapes: I input, O output, R rank, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, VeraConfig, VeraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.tuners.vera.layer import Linear as VeraLinear
from peft.tuners.vera.layer import VeraLayer
from peft.tuners.vera.model import _get_tuner_layer_class
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ray_jobs.adapters import dora
from ray_jobs.adapters.dora import row_norm, wide
from ray_jobs.base import four_bits
from ray_jobs.base.four_bits import gathered

PEFT_TYPE = "DVORA"


@dataclass
class DvoraConfig(VeraConfig):
    """VeRA's configuration, under another `peft_type`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class DvoraLinear(VeraLinear):
    """A linear layer, dense or quantised, with DVoRA adapters around it."""

    adapter_layer_names = (*VeraLinear.adapter_layer_names, "vera_lambda_m")
    other_param_names = (*VeraLinear.other_param_names, "known_norms", "merged_changes")
    linear = staticmethod(F.linear)

    def __init__(
        self, base_layer: nn.Module, vera_A: Any, vera_B: Any, adapter_name: str, config: DvoraConfig, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        VeraLayer.__init__(self, base_layer, **kwargs)
        self.vera_lambda_m = nn.ParameterDict()
        self.known_norms: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.merged_changes: dict[str, Tensor] = {}
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, vera_A, vera_B, config.r, config)

    def update_layer(
        self,
        adapter_name: str,
        vera_A: Any,
        vera_B: Any,
        r: int,
        config: VeraConfig,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter whose initial weights change nothing."""
        super().update_layer(adapter_name, vera_A, vera_B, r, config, inference_mode, **kwargs)
        with gathered(self.get_base_layer().parameters()), torch.no_grad():
            norm = row_norm(self._frozen_weight())
        self.vera_lambda_m[adapter_name] = nn.Parameter(norm.to(self.vera_lambda_b[adapter_name].device))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with its active adapters: (..., I) to (..., O), in the dtype of `x`."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base_result = self.base_layer(x, *args, **kwargs)
        result = base_result
        for adapter in self.active_adapters:
            if adapter in self.vera_lambda_d:
                result = result + self._change(adapter, x, base_result)
        return result.to(x.dtype)

    def _change(self, adapter: str, x_TI: Tensor, base_result_TO: Tensor) -> Tensor:
        """The term that an adapter adds to the base's result: (s - 1) W x + s L_b B L_d A x, where s = m / norm.

        Written as a difference, as in peft's DoRA, so that a fresh adapter adds exactly zero. Dropout applies to both
        terms, as in the DoRA authors' code; the base layer is then computed a second time.
        """
        if self.training and not isinstance(self.vera_dropout[adapter], nn.Identity):
            x_TI = self.vera_dropout[adapter](x_TI)
            base_result_TO = self.base_layer(x_TI)
        bias_O = self.get_base_layer().bias
        if bias_O is not None:
            base_result_TO = base_result_TO - bias_O
        b_O, d_R = self.vera_lambda_b[adapter], self.vera_lambda_d[adapter]
        A_RI, B_OR = shared_matrices(self, adapter)
        direction_TO = self.linear(d_R * self.linear(self._cast_input_dtype(x_TI, d_R.dtype), A_RI), B_OR)
        scale_O = self._scale(adapter)
        return (scale_O - 1).to(base_result_TO.dtype) * base_result_TO + (scale_O * b_O).to(b_O.dtype) * direction_TO

    def _scale(self, adapter: str) -> Tensor:
        return dora.ratio(dora.whole(self.vera_lambda_m[adapter]), self.weight_norm(adapter))

    @torch.no_grad()
    def weight_norm(self, adapter: str) -> Tensor:
        """||W + L_b B L_d A||_c, shape (O,), outside the autograd graph.

        In evaluation it is cached for as long as the vectors keep their values, as generation would spend more time on
        it than on the base; by value, since DeepSpeed writes to parameters without increasing autograd's version
        counter. In bfloat16 the rounding of the product moves a norm by a few 1e-4, and training by hundredths.
        """
        b_O, d_R = self.vera_lambda_b[adapter], self.vera_lambda_d[adapter]
        if not self.training and adapter in self.known_norms:
            cached_b, cached_d, norm_O = self.known_norms[adapter]
            if _same(cached_b, b_O) and _same(cached_d, d_R):
                return norm_O
        norm_O = row_norm(self._frozen_weight(), *lora_factors(self, adapter))
        if not self.training:
            self.known_norms[adapter] = b_O.clone(), d_R.clone(), norm_O
        return norm_O

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W, which merging adds to the weight: in the layout of the base's weight, in float32 or wider."""
        if adapter in self.merged_changes:
            return self.merged_changes[adapter]
        A_RI, B_OR = lora_factors(self, adapter)
        scale_O1 = self._scale(adapter)[:, None]
        change_OI = (scale_O1 - 1) * wide(self._frozen_weight()) + scale_O1 * (wide(B_OR) @ wide(A_RI))
        return change_OI.T if self.fan_in_fan_out else change_OI

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapters into the base's weight, with the same change that `forward` applies; it is kept until
        `unmerge`, as the norm cannot be recovered from the merged weight."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.vera_lambda_d:
                continue
            change, weight = self.get_delta_weight(adapter), self.get_base_weight()
            merged = (weight + change).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.set_base_weight(merged)
            self.merged_changes[adapter] = change
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract the merged adapters again; exact except for rounding."""
        super().unmerge()
        self.merged_changes.clear()
        self.known_norms.clear()

    def _frozen_weight(self) -> Tensor:
        """The base's weight without any merged adapter, dequantised: (O, I)."""
        stored = self.get_base_layer().weight
        if (state := getattr(stored, "quant_state", None)) is not None:
            four_bits.require_one_device(stored, state)
        weight = self.get_base_weight()
        for change in self.merged_changes.values():
            weight = weight - change
        return weight.T if self.fan_in_fan_out else weight


class DvoraModel(VeraModel):
    """Wraps the targeted layers in `DvoraLinear`."""

    @staticmethod
    def _create_new_module(
        config: DvoraConfig, vera_A: Any, vera_B: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> DvoraLinear:
        if _get_tuner_layer_class(target) is None:
            raise TypeError(f"{type(target).__name__} is no linear layer that DVoRA can adapt")
        config.fan_in_fan_out = isinstance(target, Conv1D)
        return DvoraLinear(target, vera_A, vera_B, adapter_name, config, **kwargs)


def lora_factors(layer: VeraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of one layer's VeRA or DVoRA update, with a scaling of one: A' = L_d A and B' = L_b B."""
    A_RI, B_OR = shared_matrices(layer, adapter)
    return layer.vera_lambda_d[adapter][:, None] * A_RI, layer.vera_lambda_b[adapter][:, None] * B_OR


def unify_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Convert the vectors and shared matrices of VeRA or DVoRA to `dtype`; magnitudes and all else keep theirs.

    peft's layers need one dtype. DeepSpeed converts only parameters, and the matrices are buffers.
    """
    for layer in model.modules():
        if isinstance(layer, VeraLayer):
            for name in {*layer.adapter_layer_names, "vera_A", "vera_B"} - {*dora.NAMES}:
                getattr(layer, name).to(dtype)  # in place; the layers share the matrices' container


def shared_matrices(layer: VeraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """This layer's slices of the shared matrices, A (R, I) and B (O, R)."""
    device = layer.vera_lambda_d[adapter].device
    A_RI = layer.vera_A[adapter][:, : layer.in_features]
    B_OR = layer.vera_B[adapter][: layer.out_features]
    return A_RI.to(device), B_OR.to(device)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


# What peft's register_peft_method does, except that it requires a member of its closed enum; peft compares strings.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = DvoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = DvoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = DvoraModel.prefix
