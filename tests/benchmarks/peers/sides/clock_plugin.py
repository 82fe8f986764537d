"""Axolotl takes callbacks from plugins alone, which it imports by name."""

from typing import Any

import measured
from axolotl.integrations.base import BasePlugin

CLOCK = measured.Clock()


class ClockPlugin(BasePlugin):
    """Puts the clock into its Trainer."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [CLOCK]
