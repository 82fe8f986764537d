"""The points of a training's curve, under the names that charts use."""

import math
from collections.abc import Mapping
from typing import Any


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record of metrics.jsonl, such as train/loss and eval/loss."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "step") and isinstance(value, (int, float)) and math.isfinite(value)
    }
