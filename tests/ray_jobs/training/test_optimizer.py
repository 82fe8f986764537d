"""AdamW's kernel, by where DeepSpeed holds what it steps."""

import pytest
import torch

from components.config.train import TrainConfig
from ray_jobs.training import zero


@pytest.mark.parametrize(
    ("device", "is_offloaded", "fused"), [("cpu", False, True), ("meta", False, None), ("meta", True, True)]
)
def test_master_weights_in_host_memory_take_the_fused_kernel_wherever_the_parameters_are(
    device, is_offloaded, fused, monkeypatch
):
    given = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **settings: given.append(settings["fused"]))
    layer = torch.nn.Linear(2, 2, device=device)
    zero.make(layer, TrainConfig(cpu_offload=is_offloaded, zero_stage=2))
    assert given == [fused]
