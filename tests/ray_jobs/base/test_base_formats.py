"""The base in memory: bfloat16, NF4 and int8, each computing with the weights that it says it holds."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.config.schema import MethodConfig, ModelConfig
from ray_jobs.adapters import build
from ray_jobs.base import attention, base_model


def load(reference: object, base_format: str = "bf16"):
    config = ModelConfig(base=str(reference))
    return base_model.load_model(base_model.resolve(config), config, base_format, use_gpu=False)


def test_a_bf16_base_is_bfloat16_and_frozen(tiny_base):
    model = load(tiny_base)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_an_nf4_base_holds_four_bits_a_weight_doubly_quantised(tiny_base):
    model = load(tiny_base, "nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.bfloat16  # the storage's
        assert layer.weight.numel() * 4 == layer.in_features * layer.out_features
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_an_nf4_base_computes_as_one_stored_in_bytes(tiny_base):
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_base,
        dtype=torch.bfloat16,
        attn_implementation=attention.register(),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    ).train()
    ours = load(tiny_base, "nf4").train()
    assert plain.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    embedded = ours.get_input_embeddings()(torch.arange(32)[None]).detach()
    results = []
    for model in (plain, ours):
        inputs = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.square().sum().backward()
        results.append((logits, inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_an_nf4_base_is_never_repacked_by_a_measurement_on_cpu(tiny_base):
    model = load(tiny_base, "nf4").eval()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    before = [layer.weight.data.view(torch.uint8).clone() for layer in layers]  # as bfloat16 some are not a number
    with torch.inference_mode():
        model(input_ids=torch.arange(64)[None])
    for layer, weight in zip(layers, before, strict=True):
        assert layer.support_avx512bf16_for_cpu is False
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(layer.weight.data.view(torch.uint8), weight)
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).requires_grad_()
    model.train()(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_an_int8_base_computes_with_its_dequantised_weights_whatever_was_measured_in_between(tiny_base):
    dense, model = load(tiny_base), load(tiny_base, "int8")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
    assert len(layers) == 2 * 7
    torch.manual_seed(0)
    for name, layer in layers.items():
        scale = layer.weight.SCB[:, None] / 127
        weight = layer.weight.data.float() * scale
        assert ((weight - dense.get_submodule(name).weight.float()).abs() <= 0.5001 * scale).all()
        x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
        x[:, 3] *= 30  # an outlier, which LLM.int8() multiplies by itself
        # While it trains only the weights are int8; a measurement rounds the activations too (arXiv:2208.07339).
        for is_training, noise in [(True, 0.004), (False, 0.01), (True, 0.004)]:
            layer.train(is_training)
            inputs = x.clone().requires_grad_()
            output = layer(inputs)
            gradient = torch.randn_like(output)
            output.backward(gradient)
            expected, expected_gradient = x.float() @ weight.T, gradient.float() @ weight
            assert (output - expected).norm() < noise * expected.norm()
            assert (inputs.grad - expected_gradient).norm() < 0.004 * expected_gradient.norm()
        assert torch.equal(layer.weight.data.float() * scale, weight)
        assert torch.equal(layer.state_dict()["SCB"][:, None] / 127, scale)


@pytest.mark.parametrize("base_format", ["nf4", "int8"])
def test_dora_reads_a_quantised_weight_and_leaves_it_where_it_is(tiny_base, base_format):
    # By itself peft would put a copy in its place at every pass, which has no scales and is nothing that ZeRO-3 knows.
    adapted = build.attach(
        load(tiny_base, base_format), MethodConfig(name="dora", rank=4), base_reference="tiny", seed=0
    ).train()
    before = dict(adapted.named_parameters())
    logits = [adapted(input_ids=torch.arange(16)[None]).logits for _ in range(3)]
    assert torch.equal(logits[0], logits[2])
    assert all(parameter is before[name] for name, parameter in adapted.named_parameters())
