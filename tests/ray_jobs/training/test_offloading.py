"""What a worker leaves on its device for the backward pass where activations are offloaded; host memory stands in."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, modeling_utils

from components.config import config_file
from ray_jobs.base import base_model
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.training.worker import assemble
from tests.ray_jobs.conftest import CONFIG

BATCH, LENGTH = 4, 48


@pytest.mark.slow
def test_the_input_of_every_layer_leaves_and_the_gradients_are_what_they_were(tiny_base, monkeypatch):
    gone: list[torch.Tensor] = []

    def to_host(*, pin_memory: bool, device_type: str) -> saved_tensors_hooks:
        """As torch's save_on_cpu, without a GPU to copy from."""
        assert pin_memory
        return saved_tensors_hooks(lambda tensor: gone.append(tensor) or tensor.clone(), lambda tensor: tensor.clone())

    monkeypatch.setattr(modeling_utils, "save_on_cpu", to_host)
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 256
    gradients = []
    for is_offloaded in (False, True):
        changes = ["ray.use_gpu=true", "train.gradient_checkpointing=true"]
        config = config_file.loads(
            CONFIG.format(base=tiny_base), [*changes, f"train.activation_offloading={str(is_offloaded).lower()}"]
        )
        adapted = assemble(config, base_model.resolve(config.model), use_gpu=False)
        answer_nll(adapted, tokens, tokens).mean().backward()
        gradients.append([each.grad for each in adapted.parameters() if each.requires_grad])
        assert len(gone) == 2 * is_offloaded  # the base's layers
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])

    shape = AutoConfig.from_pretrained(tiny_base)
    planned = Rehearsal.of(config, shape).step(BATCH, LENGTH, checkpointing=True)
    assert planned.inputs == sum(tensor.nbytes for tensor in gone)
    assert planned.inputs <= planned.kept
