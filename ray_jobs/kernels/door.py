"""The interface to the kernels: choose the dtype of products, adopt a model's layers, and restore them.

Code that loads a base or attaches an adapter knows nothing of kernels. The caller that runs the model chooses once
(`choose`, `agree`), loads with `load_model`, and calls `Kernels.adopt` again once an adapter is attached. `part` undoes
what an adapter's training needs, before the base is reused for the next one. On a GPU, and on a processor with fast
bfloat16 products, weights stay in the layers that transformers, bitsandbytes and peft made.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from components.config.methods import BaseFormat
from components.config.ray import MatmulDtype
from components.config.schema import ModelConfig, RunConfig
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import processor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound="nn.Module")


@dataclass(frozen=True)
class Kernels:
    """What a process, or every process of a group, computes the products of a model on the CPU in.

    Whatever it is, weights and activations are the same 16 bits.
    """

    dtype: MatmulDtype = "bfloat16"

    def adopt(self, model: Model) -> Model:
        """Give a base, or a base with an adapter on it, the layers for these products, in place. Twice is as once."""
        from peft import PeftModel

        if self.dtype == "float32":
            from ray_jobs.kernels.float32_adapters import LAYERS
            from ray_jobs.kernels.float32_layers import multiply_in_float32

            multiply_in_float32(model, LAYERS)
        if isinstance(model, PeftModel):
            from ray_jobs.kernels import fused, fused_layer

            fused.adopt(model)
            fused_layer.adopt(model)
        return model

    def hold_dense(self, model: "nn.Module") -> None:
        """Hold the frozen weights of a model on the CPU once as products read them; see `widened.widen`."""
        from ray_jobs.kernels import widened

        widened.widen(model, self.dtype)

    def hold_dense_if_room(self, model: "nn.Module", *, sharers: int = 1) -> bool:
        """The same where memory allows, which `sharers` processes of this machine share; gives whether it did."""
        from ray_jobs.kernels import widened

        return widened.widen_if_room(model, self.dtype, sharers=sharers)

    def has_room(self, num_weights: int, *, sharers: int = 1) -> bool:
        """Whether so many weights may be held dense by each of `sharers` processes of this machine."""
        from ray_jobs.kernels import widened

        return widened.has_room(num_weights, self.dtype, sharers=sharers)

    @property
    def linear(self) -> "Callable[..., Tensor]":
        """x W^T + b, with the signature of `torch.nn.functional.linear`."""
        import torch

        from ray_jobs.kernels import float32_layers

        return float32_layers.linear if self.dtype == "float32" else torch.nn.functional.linear


PLAIN = Kernels()
"""PyTorch's own products, in 16 bits."""


def load_model(
    base: Base, config: ModelConfig, base_format: BaseFormat, kernels: Kernels, **how: Any
) -> "PreTrainedModel":
    """As `base_model.load_model`, with `kernels` adopted."""
    return kernels.adopt(base_model.load_model(base, config, base_format, **how))


def adopt_single_rows(model: Model) -> Model:
    """Give a model that answers one prompt at a time the layers for a row alone, where those are faster here."""
    from ray_jobs.kernels import one_row

    one_row.adopt(model)
    return model


def part(model: "PreTrainedModel") -> None:
    """Restore a base after its adapter is removed: its decoder layers are transformers' own again.

    The layers that read the base's own weights stay: the next use in this process computes its products the same way.
    """
    from ray_jobs.kernels import fused_layer

    fused_layer.part(model)


def fixed(config: RunConfig) -> Kernels | None:
    """What the config says; None where it leaves that to a measurement."""
    wanted = config.ray.cpu_matmul_dtype
    return None if wanted == "auto" else Kernels(wanted)


def choose(config: RunConfig, base: "PretrainedConfig", *, on_gpu: bool = False) -> Kernels:
    """What this process multiplies in, by itself. Of a worker with a GPU, only what it computes on its CPU is meant."""
    if on_gpu:
        return PLAIN
    return fixed(config) or Kernels(processor.measure(processor.typical_shape(base)).faster)


def agree(config: RunConfig, base: "PretrainedConfig") -> Kernels:
    """The same for all workers of a gloo group, each of which must call it: of each dtype the slowest rate counts."""
    return fixed(config) or Kernels(processor.agreed(processor.typical_shape(base)).faster)
