"""The tiny base in memory, and how it is asked."""

import pytest

from components.config.schema import ModelConfig
from ray_jobs.base import base_model
from ray_jobs.text import chat_format


@pytest.fixture(scope="module")
def tiny(tiny_base):
    config = ModelConfig(base=str(tiny_base))
    base = base_model.resolve(config)
    model = base_model.load_model(base, config, "bf16", use_gpu=False).eval()
    return model, chat_format.load(base, config)
