"""Converting a frozen base's weights once to the dtype of its matrix products, instead of before each product.

Generation takes a forward pass per token, and dequantising 4-bit weights is most of such a pass; in a training step it
is a fifth. The converted weights are exactly those that each pass would compute.
"""

import logging
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import int8_vectorwise_dequant

from components.config.ray import MatmulDtype
from components.shared.memory import available_bytes
from ray_jobs.base.four_bits import dequantize_4bit
from ray_jobs.kernels import float32_layers

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory that dense weights may take; the rest is for the KV cache and activations."""


def widen(model: torch.nn.Module, products: MatmulDtype) -> None:
    """Turn the frozen layers of a model on the CPU into dense ones, in place; an adapter's trained layers stay.

    `products` is the dtype of the matrix products. Outputs are the same up to the order of summation. An int8 base with
    products in bfloat16 stays as it is: there bitsandbytes rounds inputs to int8 as well.
    """
    dtype = _dtype(products)
    for layer in _layers(model, dtype):
        weight = torch.nn.Parameter(_weight(layer).to(dtype), requires_grad=False)
        layer.__class__ = float32_layers.Linear if dtype is torch.float32 else torch.nn.Linear
        layer.weight = weight


def widen_if_room(model: torch.nn.Module, products: MatmulDtype, *, sharers: int = 1) -> bool:
    """Call `widen` if the free memory, shared by `sharers` processes of this machine, allows it; returns whether any
    layer was converted."""
    dtype = _dtype(products)
    num_weights = sum(layer.in_features * layer.out_features for layer in _layers(model, dtype))
    if not has_room(num_weights, products, sharers=sharers):
        logger.info("the base is read as it is stored: free memory has no room for %d dense weights", num_weights)
        return False
    widen(model, products)
    return num_weights > 0


def has_room(num_weights: int, products: MatmulDtype, *, sharers: int = 1) -> bool:
    """Whether free memory allows each of `sharers` processes of this machine to hold `num_weights` dense weights."""
    return num_weights * _dtype(products).itemsize <= MEMORY_SHARE * available_bytes() / sharers


def _dtype(products: MatmulDtype) -> torch.dtype:
    return torch.float32 if products == "float32" else torch.bfloat16


def _layers(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    kinds: tuple[type, ...] = (bitsandbytes.nn.Linear4bit,)
    if dtype is torch.float32:
        kinds = (*kinds, bitsandbytes.nn.Linear8bitLt, float32_layers.Linear)
    for module in model.modules():
        layer: Any = module
        is_dense = isinstance(layer, float32_layers.Linear) and layer.weight.dtype is dtype
        if not issubclass(type(layer), kinds) or is_dense:
            continue
        if layer.weight.device.type == "cpu" and not layer.weight.requires_grad:
            yield layer


@torch.no_grad()
def _weight(layer: Any) -> torch.Tensor:
    """The dequantised weight (O, I) that a product would read."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return dequantize_4bit(layer.weight, layer.weight.quant_state)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        return int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
    return layer.weight.data
