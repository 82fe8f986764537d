"""The interface to the kernels: choose the dtype of products, adopt a model's layers, and restore them.

Code that loads a base or attaches an adapter does not depend on kernels. The caller that runs the model chooses once
(`choose`, `agree`), loads with `load_model`, and calls `Kernels.adopt` again once an adapter is attached. `part` undoes
what an adapter's training needs, before the base is reused for the next one. On a GPU, and on a CPU with fast bfloat16
products, weights stay in the layers that transformers, bitsandbytes and peft made.
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
    """The dtype in which a process, or every process of a group, computes a model's products on the CPU.

    In either case, weights and activations are the same 16-bit values.
    """

    dtype: MatmulDtype = "bfloat16"

    def adopt(self, model: Model) -> Model:
        """Replace a base's layers, with or without an adapter, by those for these products, in place; idempotent."""
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
        """Convert a model's frozen weights on the CPU to the dtype of its products, once; see `widened.widen`."""
        from ray_jobs.kernels import widened

        widened.widen(model, self.dtype)

    def hold_dense_if_room(self, model: "nn.Module", *, sharers: int = 1) -> bool:
        """As `hold_dense`, if the memory that `sharers` processes share here allows it; returns whether it did."""
        from ray_jobs.kernels import widened

        return widened.widen_if_room(model, self.dtype, sharers=sharers)

    def has_room(self, num_weights: int, *, sharers: int = 1) -> bool:
        """Whether there is memory for `num_weights` dense weights in each of `sharers` processes of this machine."""
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
    """Load a base as `base_model.load_model` does, and adopt `kernels`."""
    return kernels.adopt(base_model.load_model(base, config, base_format, **how))


def adopt_single_rows(model: Model) -> Model:
    """Replace layers of a model that answers one prompt at a time by single-row variants, where these are faster."""
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
    """The kernels that the config sets; None where it leaves the choice to a measurement."""
    wanted = config.ray.cpu_matmul_dtype
    return None if wanted == "auto" else Kernels(wanted)


def choose(config: RunConfig, base: "PretrainedConfig", *, on_gpu: bool = False) -> Kernels:
    """Choose this process's kernels, without other workers. For GPU workers they concern only what runs on the CPU."""
    if on_gpu:
        return PLAIN
    return fixed(config) or Kernels(processor.measure(processor.typical_shape(base)).faster)


def agree(config: RunConfig, base: "PretrainedConfig") -> Kernels:
    """Choose kernels for all workers of a gloo group, by each dtype's slowest rate. Every worker must call this."""
    return fixed(config) or Kernels(processor.agreed(processor.typical_shape(base)).faster)
