"""sha256 of a resolved config as canonical JSON, in hex; `values` are its sections."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from components.config.ray import OF_EVERY_STEP
from components.config.train import SHARING


def of_all(values: Mapping[str, Any]) -> str:
    """The digest of all keys and values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def of_training(values: Mapping[str, Any]) -> str:
    """The digest without the keys that only say how the work of a step is shared out."""
    ray = {key: value for key, value in values["ray"].items() if key in OF_EVERY_STEP}
    train = {key: value for key, value in values["train"].items() if key not in SHARING}
    return of_all({**values, "ray": ray, "train": train})
