"""What differs on a GPU: other kernels for NF4 and attention must give the losses of the CPU. `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from components.config.schema import RunConfig
from components.prepare.validate import validate
from ray_jobs.base import base_model, chat_format
from ray_jobs.base.answer_loss import answer_nll
from ray_jobs.base.batching import collate, tokenize
from tests.models.tiny import colour_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
def test_the_loss_on_a_gpu_is_that_on_the_cpu(config: RunConfig, tiny_base: Path, base_format):
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    split = tokenize([validate(row).record for row in colour_rows(16)], chat, config.model.max_length)
    batch = collate(split, range(len(split)), chat.pad)
    losses = []
    for use_gpu in (False, True):
        model = base_model.load_model(base, config.model, base_format, use_gpu=use_gpu)
        with torch.inference_mode():
            nll = answer_nll(model, batch["input_ids"].to(model.device), batch["labels"].to(model.device))
        losses.append(nll.mean().item())
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
