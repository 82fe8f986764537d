"""A release to come, as far as the config goes: one key more, with a default."""

from typing import Annotated

from components.config.schema import RunConfig, TrainConfig
from components.config.section import Added


class TrainConfigToCome(TrainConfig):
    patience: Annotated[int, Added("9.0.0")] = 3


def to_come(config: RunConfig, **keys: int) -> RunConfig:
    """The config as that release reads it, with the new key set or at its default."""
    return config.model_copy(update={"train": TrainConfigToCome(**dict(config.train), **keys)})
