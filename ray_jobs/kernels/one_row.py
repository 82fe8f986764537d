"""Linear layers that use matrix-vector products for a single row where that is faster, as when decoding one prompt.

A matrix-matrix product in 16 bits reads the weights twice where oneDNN packs them first; which is faster depends on the
processor (AMX: the vector's, AVX-512 BF16: the matrix', by 1.8), so it is measured. For an adapter's small factors
vectors always are. Several rows are multiplied as before, and so is what `fused` does not cover.

Shapes: I input, O output, R rank.
"""

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_jobs.kernels import fused

ENOUGH_BYTES = 256_000_000
"""Bytes of weights to time both kinds of product on: more than the caches hold, and read in a tenth of a second."""
REPEATS = 2


class Linear(nn.Linear):
    """A dense layer without an adapter, such as the output head, with matrix-vector products for single rows."""

    def forward(self, input: Tensor) -> Tensor:
        return _by_vector(self, input) if _is_row(input) else super().forward(input)


class AdaptedLinear(fused.Linear):
    """LoRA around a dense layer, with matrix-vector products for single rows."""

    by_vector: bool
    """Whether the base layer's weight uses a matrix-vector product too; the LoRA factors always do."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base = self.get_base_layer()
        if not _is_row(x) or type(base) is not nn.Linear or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        lora = None if self.disable_adapters else fused.adapted(self, x)
        if lora is None and not self.disable_adapters:
            return super().forward(x)
        y_O = _by_vector(base, x) if self.by_vector else F.linear(x, base.weight, base.bias)
        if lora is not None:
            h_R = torch.mv(lora.A, x.flatten())
            y_O.view(-1).addmv_(lora.B, h_R, alpha=lora.scaling)
        return y_O


def adopt(model: nn.Module) -> None:
    """Convert a model's dense layers to the product that is faster here; inference only, there is no backward pass."""
    convert(model, by_vector=vectors_win([module.weight for module in model.modules() if type(module) is nn.Linear]))


def convert(model: nn.Module, *, by_vector: bool) -> None:
    """Convert a model's dense layers without measuring: `by_vector` says which product the base weights use."""
    inner = {id(module.get_base_layer()) for module in model.modules() if isinstance(module, fused.Linear)}
    for module in model.modules():
        if type(module) is fused.Linear:
            module.__class__ = AdaptedLinear
            module.by_vector = by_vector
        elif type(module) is nn.Linear and id(module) not in inner and by_vector:
            module.__class__ = Linear


def vectors_win(weights: Sequence[Tensor]) -> bool:
    """Measure, on some of these matrices (O, I), whether matrix-vector products are faster for a single row here."""
    some, room = [], ENOUGH_BYTES
    for weight in weights:
        if weight.dtype in fused.HALF and weight.device.type == "cpu" and room > 0:
            some.append((weight.detach(), weight.new_ones(weight.shape[1])))
            room -= weight.nbytes
    best = dict.fromkeys((torch.mv, _matrix), math.inf)
    for _ in range(REPEATS):
        for product in best:
            began = time.perf_counter()
            for weight, x_I in some:
                product(weight, x_I)
            best[product] = min(best[product], time.perf_counter() - began)
    return best[torch.mv] < best[_matrix]


def _matrix(weight: Tensor, x_I: Tensor) -> Tensor:
    return F.linear(x_I[None], weight)


def _is_row(x: Tensor) -> bool:
    return x.numel() == x.shape[-1] and x.dtype in fused.HALF and x.device.type == "cpu"


def _by_vector(layer: nn.Linear, x: Tensor) -> Tensor:
    y_O = (
        torch.mv(layer.weight, x.flatten())
        if layer.bias is None
        else torch.addmv(layer.bias, layer.weight, x.flatten())
    )
    return y_O.view(*x.shape[:-1], -1)
