"""The smallest config, with some keys set in it: as it is loaded, or what a person reads who got it wrong."""

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import ConfigError

GOOD = """
[adapter]
name = "sums"
[model]
base = "org/name"
[data]
source = "rows.jsonl"
"""


def set_in(*overrides: str, text: str = GOOD) -> RunConfig:
    return config_file.loads(text, overrides)


def message_of(*overrides: str, text: str = GOOD) -> str:
    with pytest.raises(ConfigError) as caught:
        config_file.loads(text, overrides)
    return str(caught.value)
