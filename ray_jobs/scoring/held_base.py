"""One frozen base per process, reused by successive trainings: what a training adds to it is removed again.

Reading and quantising a base takes longer than many trials' training, and as long as scoring many records.
"""

import gc
from typing import TYPE_CHECKING, Any

from components.config.methods import BaseFormat
from components.config.schema import ModelConfig
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import door
from ray_jobs.kernels.door import Kernels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class HeldBase:
    """Loads as `door.load_model` does, and returns the same model again for the same arguments.

    One model at a time: the previous one is released before another is read.
    """

    def __init__(self) -> None:
        self.num_loaded = 0
        self.start_loss: float | None = None
        """Validation loss per answer token of the held base, without an adapter; None until it is measured."""
        self.general_nll: list[float] | None = None
        """Negative log-likelihood of the held base on each passage of general text; None until it is measured."""
        self.free_since: float | None = None
        """Time at which its last use ended, on the monotonic clock."""
        self.kernels: Kernels | None = None
        """The kernels of its matrix products."""
        self._key: tuple[Any, ...] = ()
        self._model: PreTrainedModel | None = None
        self._wide: dict[str, torch.Tensor] = {}

    def load(
        self, base: Base, config: ModelConfig, base_format: BaseFormat, kernels: Kernels, **how: Any
    ) -> "PreTrainedModel":
        """Load the base, or return the held one without any adapter; its previous use must have ended."""
        key = (base.identity, config.attention, config.trust_remote_code, base_format, kernels, how)
        if self._model is None or key != self._key:
            self._model = self.start_loss = self.general_nll = None
            self._wide = {}
            gc.collect()  # reference cycles: an adapted model and its engine, 4-bit weights and their layers
            self._model = door.load_model(base, config, base_format, kernels, **how)
            self._wide = _wider_than_16_bits(self._model)
            self._key, self.kernels = key, kernels
            self.num_loaded += 1
        else:
            self.strip()
        return self._model

    def strip(self) -> None:
        """Restore the model to its state when loaded, except that weights that were made dense stay dense."""
        if self._model is not None and strip(self._model):
            for name, weight in self._wide.items():
                self._model.get_parameter(name).data = weight
            gc.collect()


def _wider_than_16_bits(model: "PreTrainedModel") -> dict[str, "torch.Tensor"]:
    """The weights that transformers keeps in float32, such as routers, and that DeepSpeed would cast to 16 bits."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.dtype.itemsize > 2}


def strip(model: "PreTrainedModel") -> bool:
    """Remove what peft and a training have added to a base: layers, hooks, and peft's attributes.

    Returns whether there were any adapter layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in wrapped:
        if not any(name.startswith(f"{outer}.") for outer in wrapped):  # a wrapper may wrap another
            model.set_submodule(name, model.get_submodule(name).get_base_layer())
    for note in ("peft_config", "_hf_peft_config_loaded"):
        if note in vars(model):
            delattr(model, note)
    door.part(model)
    model.disable_input_require_grads()
    if model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
    model.requires_grad_(False)
    return bool(wrapped)
