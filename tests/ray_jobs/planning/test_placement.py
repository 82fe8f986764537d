"""Whether one process reads a base on the GPUs of its machine, and that several of them hold it as one does."""

import pytest
import torch

from components.config import config_file
from components.config.schema import ModelConfig
from components.shared.errors import UserError
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.planning import capacity
from tests.models.shapes import LLAMA_2_7B
from tests.ray_jobs.conftest import CONFIG

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "method", "expected"),
    [
        ([], "lora", False),
        ([16], "lora", True),  # 12.6 GiB of weights, of 12.8 that they may take
        ([15], "lora", False),
        ([8, 8], "lora", True),
        ([15], "qlora", True),
    ],
)
def test_gpus_are_taken_where_together_they_hold_the_base(free, method, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index] * GIB, 80 * GIB))
    LLAMA_2_7B.save_pretrained(tmp_path)
    config = config_file.loads(CONFIG.format(base=tmp_path), [f"method.name={method}"])
    assert capacity.on_gpus(config, Base("llama", tmp_path, {})) is expected


@pytest.mark.slow
def test_a_base_that_no_memory_here_holds_in_float32_is_refused_with_what_it_takes(tmp_path, monkeypatch):
    LLAMA_2_7B.save_pretrained(tmp_path)
    config, base = config_file.loads(CONFIG.format(base=tmp_path)), Base("llama", tmp_path, {})
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 26 * GIB)
    capacity.require_float32(config, base)  # 6.74 billion weights of 4 bytes are 25.1 GiB
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 25 * GIB)
    with pytest.raises(UserError, match="llama takes 25 GiB, and this machine has 25: do it on one with more memory"):
        capacity.require_float32(config, base)


@pytest.mark.gpu
@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
def test_a_base_on_several_gpus_says_what_it_says_on_one(base_format, tiny_base):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    config = ModelConfig(base=str(tiny_base))
    tokens = torch.arange(24)[None]
    said = []
    for across_gpus in (False, True):
        model = base_model.load_model(
            base_model.resolve(config), config, base_format, use_gpu=True, across_gpus=across_gpus
        )
        with torch.inference_mode():
            said.append(model(input_ids=tokens.to(model.device)).logits.float().cpu())
    assert len({parameter.device for parameter in model.parameters()}) > 1
    torch.testing.assert_close(*said, rtol=0.02, atol=0.02)
