"""Which bases are language models and by which classes they are loaded; which GPUs know bfloat16 or have kernels."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers

from components.config import config_file
from components.config.schema import ModelConfig
from components.shared.errors import ConfigError
from ray_jobs.base import base_model
from ray_jobs.base.architecture import auto_class, dtype_on, require_causal
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.training import zero
from tests.models import zoo
from tests.ray_jobs.conftest import CONFIG


@pytest.mark.parametrize(
    ("name", "is_loaded_as"),
    [
        ("Llama, tied", "LlamaForCausalLM"),
        ("Gemma 3, with vision", "Gemma3ForConditionalGeneration"),
        ("Ministral 3, with vision", "Mistral3ForConditionalGeneration"),
        ("Qwen3-VL", "Qwen3VLForConditionalGeneration"),
    ],
)
def test_a_base_is_loaded_as_what_transformers_saved(name, is_loaded_as, tmp_path):
    zoo.build(name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [is_loaded_as]
    config = ModelConfig(base=str(tmp_path))
    model = base_model.load_model(base_model.resolve(config), config, "bf16", use_gpu=False)
    assert type(model).__name__ == is_loaded_as


@pytest.mark.parametrize("kind", ["T5Config", "BertConfig", "BartConfig", "WhisperConfig", "ViTConfig"])
def test_what_does_not_write_from_left_to_right_is_refused_by_the_plan(kind, tmp_path):
    shape = getattr(transformers, kind)()
    shape.save_pretrained(tmp_path)
    config = config_file.loads(CONFIG.format(base=tmp_path))
    with pytest.raises(ConfigError, match=f"of the type {shape.model_type}, which is no language model that writes"):
        Rehearsal.of(config, shape)


def test_a_base_that_looks_at_padding_is_refused():
    with pytest.raises(ConfigError, match="of the type doge, which chooses the tokens that it looks at, padding among"):
        require_causal(transformers.DogeConfig(), reference="x")


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_base_that_wants_a_package_which_is_not_there_is_refused_with_its_name(tmp_path):
    shape = transformers.Gemma3nConfig()  # whose tower for sight is timm's
    config = config_file.loads(CONFIG.format(base=tmp_path))
    with pytest.raises(ConfigError, match=r"wants what is not installed where this runs: .* requires the timm library"):
        Rehearsal.of(config, shape)


def test_an_encoder_that_was_made_a_decoder_and_a_base_that_brings_its_code_are_taken():
    for shape in (
        transformers.BertConfig(is_decoder=True),
        transformers.PretrainedConfig(auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}),
    ):
        require_causal(shape, reference="x")
        assert auto_class(shape) is transformers.AutoModelForCausalLM


V100, T4, A100, RTX4090, H100 = (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, torch.bfloat16),
        (V100, torch.float16),
        (T4, torch.float16),
        (A100, torch.bfloat16),
        (RTX4090, torch.bfloat16),
        (H100, torch.bfloat16),
    ],
)
def test_a_gpu_that_does_not_know_bfloat16_trains_in_float16(capability, expected):
    assert dtype_on("auto", capability) is expected
    assert dtype_on("bfloat16", capability) is torch.bfloat16
    assert dtype_on("float16", capability) is torch.float16


def test_a_gpu_without_kernels_is_refused_before_a_base_is_fetched_for_it(monkeypatch):
    def ones(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_name=lambda: "Tesla V100"))
    with pytest.raises(ConfigError, match=r"does not run on Tesla V100 .*no kernel image.*: take a newer ray\.gpu"):
        zero.prepare_environment(use_gpu=True)
