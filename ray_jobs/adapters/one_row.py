"""Layers that multiply a single row as a vector: what answering one prompt on a CPU takes for every token.

A product of two 16-bit matrices reads its weights twice, as oneDNN packs them first; with a vector PyTorch reads them
once. Both add up in float32. More rows than one go as before, and so does what an adapter cannot do in one product: see
`fused`.

Shapes: I input, O output, R rank.
"""

import torch
from torch import Tensor, nn

from ray_jobs.adapters import fused


class Linear(nn.Linear):
    """A dense layer without an adapter, such as the output head."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return _product(self, input) if _is_row(input) else super().forward(input)


class AdaptedLinear(fused.Linear):
    """LoRA around a dense layer."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., I) to (..., O), in the type of `x`."""
        base = self.get_base_layer()
        if not _is_row(x) or type(base) is not nn.Linear or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return _product(base, x)
        found = fused.adapted(self, x)
        if found is None:
            return super().forward(x)
        y_O = _product(base, x)
        h_R = torch.mv(found.A, x.flatten())
        y_O.view(-1).addmv_(found.B, h_R, alpha=found.scaling)
        return y_O


def adopt(model: nn.Module) -> None:
    """Let a model's dense layers go this way, for answering alone: no gradient comes back through them."""
    inner = {id(module.get_base_layer()) for module in model.modules() if isinstance(module, fused.Linear)}
    for module in model.modules():
        if type(module) is fused.Linear:
            module.__class__ = AdaptedLinear
        elif type(module) is nn.Linear and id(module) not in inner:
            module.__class__ = Linear


def _is_row(x: Tensor) -> bool:
    return x.numel() == x.shape[-1] and x.dtype in fused.HALF and x.device.type == "cpu"


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    y_O = (
        torch.mv(layer.weight, x.flatten())
        if layer.bias is None
        else torch.addmv(layer.bias, layer.weight, x.flatten())
    )
    return y_O.view(*x.shape[:-1], -1)
