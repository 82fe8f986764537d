"""DVoRA as a peft method. That it computes what the paper says is in test_references.py."""

import functools
import zlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from components.config.methods import BaseFormat
from components.config.schema import MethodConfig, ModelConfig
from ray_jobs.adapters import build, dvora
from ray_jobs.adapters.build import Targets
from ray_jobs.adapters.dvora import DvoraLinear
from ray_jobs.base import base_model

IDS = torch.arange(12)[None]
DVORA = MethodConfig(name="dvora", rank=4)


def dense(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def quantised(path: Path, *, base: BaseFormat):
    config = ModelConfig(base=str(path))
    return base_model.load_model(base_model.resolve(config), config, base, use_gpu=False)


def adapted_base(path: Path, method: MethodConfig = DVORA) -> PeftModel:
    return build.attach(dense(path), method, base_reference="tiny", seed=0)


def disturb(model: torch.nn.Module, *, seed: int = 7) -> torch.nn.Module:
    """As after training: every vector has moved."""
    with torch.no_grad():
        for name, vector in model.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            if "vera_lambda_m" in name:
                vector.mul_(1 + 0.2 * torch.randn(vector.shape, generator=generator))
            elif "vera_lambda" in name:
                vector.copy_(0.3 * torch.randn(vector.shape, generator=generator))
    return model


@torch.inference_mode()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def layers(model: torch.nn.Module) -> list[DvoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, DvoraLinear)]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("base", ["float32", "bf16", "nf4", "int8"])
def test_a_fresh_adapter_is_the_base_to_the_last_bit(base, mode, tiny_base):
    model = (dense if base == "float32" else functools.partial(quantised, base=base))(tiny_base)
    model.train(mode == "train")  # int8 layers compute otherwise then
    before = model(input_ids=IDS).logits
    adapted = build.attach(model, DVORA, base_reference="tiny", seed=0).train(mode == "train")
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    assert len(layers(adapted)) == 14


def test_with_the_magnitude_at_the_new_norm_it_is_vera_to_the_last_bit(tiny_base):
    vera, ours = disturb(adapted_base(tiny_base, MethodConfig(name="vera", rank=4))), disturb(adapted_base(tiny_base))
    for layer in layers(ours):
        layer.vera_lambda_m["default"].data = layer.weight_norm("default").clone()
    assert torch.equal(logits(ours), logits(vera))
    assert not torch.equal(logits(ours), logits(dense(tiny_base)))


def test_a_row_of_zeros_stays_one(tiny_base):
    model = dense(tiny_base)
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    before = logits(model)
    adapted = build.attach(model, DVORA, base_reference="tiny", seed=0)
    assert torch.equal(logits(adapted), before)
    adapted(input_ids=IDS).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


def test_the_norm_follows_the_vectors_however_they_are_written(tiny_base):
    model = disturb(adapted_base(tiny_base))
    first = logits(model)
    assert torch.equal(logits(model), first)  # the second time from the norms that are kept
    for layer in layers(model):
        layer.vera_lambda_b["default"].data.mul_(2)  # unseen by autograd's version counter, as DeepSpeed writes
    changed = logits(model)
    model(input_ids=IDS).logits.sum().backward()  # still in evaluation mode: with norms kept while generating
    assert all(layer.vera_lambda_m["default"].grad is not None for layer in layers(model))
    fresh = adapted_base(tiny_base)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(changed, logits(fresh))
    assert not torch.equal(changed, first)


def test_dropout_reaches_base_and_update_of_the_change_as_in_doras_own_code(tiny_base):
    model = disturb(adapted_base(tiny_base, MethodConfig(name="dvora", rank=4, dropout=0.5))).train()
    layer = layers(model)[0]
    x = torch.randn(3, layer.in_features)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = x @ layer.get_base_layer().weight.T + dropped @ layer.get_delta_weight("default").T
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_checkpointing_activations_gives_the_same_gradients(tiny_base):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = disturb(adapted_base(tiny_base)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def gpt2() -> GPT2LMHeadModel:
    """Biases, and weights that lie transposed."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=16, initializer_range=0.2)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.fixture(params=["llama", "gpt2"])
def plain(request, tiny_base):
    """A factory of equal base models."""
    return gpt2 if request.param == "gpt2" else functools.partial(dense, tiny_base)


def test_merged_weights_say_the_same_and_unmerging_gives_the_base_back(plain):
    base = logits(plain())
    model = disturb(build.attach(plain(), DVORA, base_reference="tiny", seed=0))
    adapted = logits(model)
    assert (adapted - base).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(merged).argmax(-1), adapted.argmax(-1))
    unloaded = disturb(build.attach(plain(), DVORA, base_reference="tiny", seed=0)).unload()
    assert torch.equal(logits(unloaded), base)


def test_a_merge_of_broken_vectors_is_refused_and_changes_nothing(tiny_base):
    model = adapted_base(tiny_base)
    before = layers(model)[0].get_base_weight().clone()
    layers(model)[0].vera_lambda_m["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].get_base_weight(), before)


def test_several_adapters_live_on_one_base_and_merge_as_they_add(tiny_base):
    model = adapted_base(tiny_base)
    model.add_adapter("second", build.peft_config(DVORA, Targets("all-linear", [])))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(dense(tiny_base)))
    disturb(model)
    second = logits(model)
    model.set_adapter("default")
    assert not torch.allclose(logits(model), second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vera", "dvora"])
def test_it_is_a_lora_or_dora_adapter_of_plain_peft(name, tiny_base):
    model = disturb(adapted_base(tiny_base, MethodConfig(name=name, rank=4)))
    config = LoraConfig(r=4, lora_alpha=4, use_dora=name == "dvora", target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(dense(tiny_base), config)
    weights: dict[str, Tensor] = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, VeraLayer):
            lora_A, lora_B = dvora.lora_factors(layer, "default")
            weights |= {f"{layer_name}.lora_A.weight": lora_A, f"{layer_name}.lora_B.weight": lora_B}
        if isinstance(layer, DvoraLinear):
            weights[f"{layer_name}.lora_magnitude_vector"] = layer.vera_lambda_m["default"]
    result = set_peft_model_state_dict(plain, weights)
    assert not result.unexpected_keys
    assert len(weights) == 14 * (3 if name == "dvora" else 2)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_on_a_quantised_base_the_norm_is_that_of_its_dequantised_weight(base, tiny_base):
    adapted = disturb(build.attach(quantised(tiny_base, base=base), DVORA, base_reference="tiny", seed=0)).eval()
    logits(adapted)
    original = dict(dense(tiny_base).named_parameters())
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, DvoraLinear):
            lora_A, lora_B = (factor.double() for factor in dvora.lora_factors(layer, "default"))
            held = layer.get_base_weight().double()
            # Near what it was quantised from, and no integers.
            assert (held - original[f"{name}.weight"]).norm() < 0.15 * held.norm()
            norm = (held + lora_B @ lora_A).norm(dim=1)
            torch.testing.assert_close(layer.weight_norm("default").double(), norm, rtol=2e-3, atol=0)


def test_an_unmerged_nf4_layer_takes_the_norm_of_what_it_then_holds(tiny_base):
    adapted = disturb(build.attach(quantised(tiny_base, base="nf4"), DVORA, base_reference="tiny", seed=0))
    logits(adapted)
    adapted.merge_adapter()
    adapted.unmerge_adapter()  # which rounds to four bits twice
    for layer in layers(adapted):
        kept = layer.eval().weight_norm("default")
        assert torch.equal(kept, layer.train().weight_norm("default"))
