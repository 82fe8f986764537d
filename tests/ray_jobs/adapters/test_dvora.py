"""DVoRA as a peft method, and the magnitudes that DoRA and DVoRA train, against the equation in
`tests.models.magnitudes`. That they compute what the papers say is in test_references.py.
"""

import functools
import zlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from components.config import config_file
from components.config.schema import MethodConfig, RunConfig
from ray_jobs.adapters import build
from ray_jobs.adapters.dvora import DvoraLinear
from tests.models.bases import dense, load, logits
from tests.models.magnitudes import measured
from tests.models.spec import changed
from tests.models.tiny import colour_rows

IDS = torch.arange(12)[None]
DVORA = MethodConfig(name="dvora", rank=4)


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


def layers(model: torch.nn.Module) -> list[DvoraLinear]:
    return [layer for layer in model.modules() if isinstance(layer, DvoraLinear)]


@pytest.mark.parametrize(
    ("base", "mode"), [("float32", "train"), ("bf16", "eval"), ("nf4", "eval"), ("int8", "train"), ("int8", "eval")]
)
def test_a_fresh_adapter_is_the_base_to_the_last_bit(base, mode, tiny_base):
    model = dense(tiny_base) if base == "float32" else load(tiny_base, base)
    model.train(mode == "train")  # int8 layers compute otherwise then
    before = model(input_ids=IDS).logits
    adapted = build.attach(model, DVORA, base_reference="tiny", seed=0).train(mode == "train")
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    assert len(layers(adapted)) == 14


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


def test_an_unmerged_nf4_layer_takes_the_norm_of_what_it_then_holds(tiny_base):
    adapted = disturb(build.attach(load(tiny_base, "nf4"), DVORA, base_reference="tiny", seed=0))
    logits(adapted)
    adapted.merge_adapter()
    adapted.unmerge_adapter()  # which rounds to four bits twice
    for layer in layers(adapted):
        kept = layer.eval().weight_norm("default")
        assert torch.equal(kept, layer.train().weight_norm("default"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdora", "dvora"])
def test_a_training_at_the_default_rate_multiplies_by_the_magnitudes_that_it_learns(name, config: RunConfig):
    changes = [f"method.name={name}", "method.rank=8", "train.max_steps=60", "ray.num_workers=1"]
    settings = config_file.dumps(changed(config, *changes))
    rate = f"learning_rate = {config.learning_rate}"
    assert rate in settings
    found = measured(settings.replace(rate, ""), colour_rows(60 * 16 * 8 // 7 + 8), colour_rows(600))
    assert found.true_rms > 5e-4  # it learns some
    assert found.correlation > 0.99
    assert found.share_lost < 0.05
    assert found.loss_as_loaded == pytest.approx(found.loss_as_trained, abs=1e-4)
