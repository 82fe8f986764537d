"""VeRA and DVoRA layers that multiply in float32; LoRA's factors are linear layers, see `float32_layers`.

Shapes: I input, O output, R rank.
"""

from typing import Any

import peft.tuners.vera.layer
from torch import Tensor

from ray_jobs.adapters import dvora
from ray_jobs.kernels import float32_layers
from ray_jobs.kernels.float32_layers import linear


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
    **float32_layers.LAYERS,
    peft.tuners.vera.layer.Linear: VeraLinear,
    dvora.DvoraLinear: DvoraLinear,
}
