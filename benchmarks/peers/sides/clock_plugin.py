"""Axolotl takes callbacks, and arguments of the Trainer that it has no key for, from plugins, imported by name."""

from typing import Any

import measured
from axolotl.integrations.base import BasePlugin

CLOCK = measured.Clock()


class ClockPlugin(BasePlugin):
    """Puts the clock into its Trainer, and has that train on a processor in bfloat16 too."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": not measured.task()["gpu"]}

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [CLOCK]
