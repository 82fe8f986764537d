"""Bases widened for inference, against the weights that transformers' own `dequantize` gives."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.config.schema import ModelConfig
from ray_jobs.base import base_model
from ray_jobs.kernels import door, float32_layers
from ray_jobs.kernels.door import Kernels

IDS = torch.arange(40).view(2, 20)


def loaded(folder, base_format, matmul_dtype):
    config = ModelConfig(base=str(folder))
    base = base_model.resolve(config)
    return door.load_model(base, config, base_format, Kernels(matmul_dtype), use_gpu=False).eval()


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("base_format", "matmul_dtype"), [("nf4", "float32"), ("int8", "float32"), ("bf16", "float32"), ("nf4", "bfloat16")]
)
def test_a_widened_base_answers_as_before(tiny_base, base_format, matmul_dtype):
    model = loaded(tiny_base, base_format, matmul_dtype)
    before = logits(model)
    assert float32_layers.widen_if_room(model, matmul_dtype)
    assert torch.equal(logits(model), before)
    layers = [*model.model.layers.modules()]
    dtypes = {layer.weight.dtype for layer in layers if isinstance(layer, torch.nn.Linear)}
    assert dtypes == {torch.float32 if matmul_dtype == "float32" else torch.bfloat16}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16  # and so what its layers hand on


def test_its_weights_are_those_that_transformers_dequantises(tiny_base):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=nf4, dtype=torch.bfloat16)
    expected = plain.dequantize().state_dict()
    model = loaded(tiny_base, "nf4", "float32")
    float32_layers.widen_if_room(model, "float32")
    found = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(found) == 15  # two layers of seven, and the head
    for name, weight in found.items():
        assert torch.equal(weight, expected[f"{name}.weight"].float()), name


def test_of_int8_they_are_those_that_peft_dequantises_for_magnitudes_and_merging(tiny_base):
    stored, model = loaded(tiny_base, "int8", "float32"), loaded(tiny_base, "int8", "float32")
    layers = {name: layer for name, layer in stored.named_modules() if isinstance(layer, Linear8bitLt)}
    float32_layers.widen_if_room(model, "float32")
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(model.get_submodule(name).weight, dequantize_module_weight(layer)), name


def test_a_base_that_memory_has_no_room_for_stays_as_it_is(tiny_base, monkeypatch):
    model = loaded(tiny_base, "nf4", "float32")
    before = copy.deepcopy([type(module) for module in model.modules()])
    needed = 4 * sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    monkeypatch.setattr(float32_layers, "available_bytes", lambda: int(4 * needed / float32_layers.MEMORY_SHARE) - 8)
    assert not float32_layers.widen_if_room(model, "float32", sharers=4)
    assert [type(module) for module in model.modules()] == before
    monkeypatch.setattr(float32_layers, "available_bytes", lambda: int(4 * needed / float32_layers.MEMORY_SHARE) + 8)
    assert float32_layers.widen_if_room(model, "float32", sharers=4)


def test_int8_that_is_multiplied_in_bfloat16_stays_int8(tiny_base):
    model = loaded(tiny_base, "int8", "bfloat16")
    assert not float32_layers.widen_if_room(model, "bfloat16")
