"""A base in memory, as a worker has it and as anybody has it, what it answers, and one whose weights are others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from components.config.schema import ModelConfig
from ray_jobs.base import base_model


def load(reference: object, base_format: Any = "bf16"):
    """As a worker without a GPU loads it."""
    config = ModelConfig(base=str(reference))
    return base_model.load_model(base_model.resolve(config), config, base_format, use_gpu=False)


def dense(path: Path):
    """By transformers alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.inference_mode()
def logits(model: torch.nn.Module, num_tokens: int = 12) -> torch.Tensor:
    """What a model says of the first tokens of its vocabulary."""
    return model.eval()(input_ids=torch.arange(num_tokens)[None]).logits


@contextmanager
def rewritten(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a base of one file, which are written back with what was changed among them."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
