"""A streamed base must say what the same base in memory says, which transformers and bitsandbytes load."""

import gc
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from components.config.schema import ModelConfig
from ray_jobs.base import base_model
from ray_jobs.base.streamed import streamed
from ray_jobs.kernels.door import Kernels, load_model
from tests.models import zoo
from tests.models.bases import load, logits
from tests.models.tiny import build_base

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
@pytest.mark.parametrize("matmul_dtype", ["bfloat16", "float32"])
def test_a_streamed_base_says_what_the_loaded_one_says(base_format, matmul_dtype, tiny_base: Path):
    config = ModelConfig(base=str(tiny_base))
    base = base_model.resolve(config)
    kernels = Kernels(matmul_dtype)
    loaded = load_model(base, config, base_format, kernels, use_gpu=False).eval()
    with torch.inference_mode():
        expected = loaded(input_ids=IDS).logits.float()
        with streamed(base, config, base_format, linear=kernels.linear) as model:
            found = model(input_ids=IDS).logits.float()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    # Four bits are seen: the same base in 16 bits says something else.
    with streamed(base, config, "bf16") as model, torch.inference_mode():
        other = model(input_ids=IDS).logits.float()
    assert base_format == "bf16" or (other - expected).abs().max() > 0.04 * expected.abs().max()


def test_a_base_whose_model_reads_its_embeddings_by_itself_is_streamed_too(tmp_path: Path):
    config = ModelConfig(base=str(zoo.build("Gemma 4, with vision and sound", tmp_path)))
    with torch.inference_mode(), streamed(base_model.resolve(config), config, "bf16") as model:
        torch.testing.assert_close(logits(model), logits(load(tmp_path)), rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_of_a_streamed_base_memory_holds_a_layer_at_a_time(tmp_path: Path):
    config = ModelConfig(base=str(build_base(tmp_path, width=256)))
    whole, most = sum(p.nbytes for p in load(tmp_path).parameters()), 0

    def look_and_multiply(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal most
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        weights = [t for t in found if t.dim() == 2 and t.device.type == "cpu" and t.dtype == torch.bfloat16]
        most = max(most, sum({t.untyped_storage().data_ptr(): t.nbytes for t in weights}.values()))
        return linear(*inputs)

    base = base_model.resolve(config)
    with streamed(base, config, "bf16", linear=look_and_multiply) as model, torch.inference_mode():
        model(input_ids=IDS)
    assert 0 < most < 0.3 * whole


@pytest.mark.parametrize("wanted", ["auto", "flash_attention_2"])
def test_a_base_is_streamed_in_the_attention_and_dtype_of_gpu_workers(wanted, tiny_base: Path):
    config = ModelConfig(base=str(tiny_base), attention=wanted)
    base = base_model.resolve(config)
    with torch.inference_mode(), streamed(base, config, "bf16") as model:
        expected = model(input_ids=IDS).logits
    with torch.inference_mode(), streamed(base, config, "bf16", like_gpu=True, dtype=torch.float16) as model:
        found = model(input_ids=IDS).logits
    assert model.config._attn_implementation == "sdpa_records"
    assert found.dtype is torch.float16
    assert (found.float() - expected.float()).abs().max() < 0.02 * expected.float().abs().max()
