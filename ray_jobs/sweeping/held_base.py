"""One frozen base in a process, lent to one training after the other: what a trial adds to it comes off again.

Reading and quantising a base takes longer than many a trial trains.
"""

import gc
from typing import TYPE_CHECKING, Any

from components.config.methods import BaseFormat
from components.config.schema import ModelConfig
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeldBase:
    """Loads as `base_model.load_model` does, and gives the same model again to whoever asks for the same one.

    One model at a time: the one before is let go of before another is read.
    """

    def __init__(self) -> None:
        self.num_loaded = 0
        self.start_loss: float | None = None
        """Of the model that is held, once somebody has measured it."""
        self.general_nll: list[float] | None = None
        """What it makes of each passage of general text, likewise."""
        self.free_since: float | None = None
        """When whoever had it last was done with it, on the monotonic clock."""
        self._asked: tuple[Any, ...] = ()
        self._model: PreTrainedModel | None = None

    def load(self, base: Base, config: ModelConfig, base_format: BaseFormat, **how: Any) -> "PreTrainedModel":
        """The base without any adapter; whoever had it before must be done with it."""
        asked = (base, config, base_format, how)
        if self._model is None or asked != self._asked:
            self._model = self.start_loss = self.general_nll = None
            gc.collect()  # an adapted model and its engine hold each other in circles
            self._model = base_model.load_model(base, config, base_format, **how)
            self._asked = asked
            self.num_loaded += 1
        else:
            strip(self._model)
            gc.collect()
        return self._model


def strip(model: "PreTrainedModel") -> None:
    """Take off what peft and a training have put on a base: layers, hooks, and the note that it is adapted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in wrapped:
        if not any(name.startswith(f"{outer}.") for outer in wrapped):  # a wrapper may wrap another
            model.set_submodule(name, model.get_submodule(name).get_base_layer())
    for note in ("peft_config", "_hf_peft_config_loaded"):
        if note in vars(model):
            delattr(model, note)
    model.disable_input_require_grads()
    model.requires_grad_(False)
