"""Merging, against the adapter on the real quantised layers in float32, as plain transformers reads what was saved; and
plain LoRA against what it was made from, as plain peft reads it.
"""

import copy
import json
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from components.config.schema import MethodConfig
from components.shared.errors import FineloopError, UserError
from ray_jobs.adapters import build, merge
from tests.models.bases import dense, load
from tests.models.tiny_version import randomise

ROWS = merge.vocabulary_rows(256, count=20, length=64)
FEW_ROWS = merge.vocabulary_rows(256, count=8, length=64)
FORMATS = ("bf16", "nf4", "int8")
CASES = [("lora", "nf4"), ("rslora", "int8"), ("dora", "bf16"), ("qdora", "nf4"), ("vera", "int8"), ("dvora", "nf4")]


@pytest.fixture(scope="module")
def plain_base(tiny_base):
    return dense(tiny_base).eval()


@pytest.fixture(scope="module")
def bases(tiny_base):
    """The base in each format, and the dense weights that the format stands for."""
    found = {fmt: (load(tiny_base, fmt), load(tiny_base).float()) for fmt in FORMATS}
    for stored, weights in found.values():
        merge.dequantise_into(weights, stored)
    return found


def weight_of(layer) -> torch.Tensor:
    """What a quantised layer multiplies by: its answer to the identity, or LLM.int8's definition (arXiv:2208.07339)."""
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):  # the identity's answer would be rounded to bfloat16
        return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    return layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()


def in_float32(model):
    """The quantised model, every weight as it is and all arithmetic in float32."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            layer.forward = partial(torch.nn.functional.linear, weight=weight_of(layer))
        else:
            for weight in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
                weight.data = weight.data.float() if weight.is_floating_point() else weight.data
    return model


def adapted_by(method: MethodConfig, base):
    adapted = build.attach(copy.deepcopy(base), method, base_reference="s3://models/tiny", seed=0)
    randomise(adapted)
    return adapted.eval()


def saved_adapter(base, method: MethodConfig, folder: Path) -> Path:
    build.save(adapted_by(method, base), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_a_merged_model_says_what_the_adapter_says_on_the_base_it_was_trained_on(name, fmt, bases, tmp_path):
    quantised, dequantised = bases[fmt]
    folder = saved_adapter(dequantised, MethodConfig(name=name, base=fmt, rank=8), tmp_path / "adapter")
    reference = list(merge.logits(build.load(in_float32(quantised), folder).eval(), ROWS))
    untouched = list(merge.logits(dequantised, ROWS))

    merge.merge(build.load(copy.deepcopy(dequantised), folder)).save_pretrained(tmp_path / "merged")

    found = merge.agreement(reference, merge.logits(dense(tmp_path / "merged").eval(), ROWS))
    assert found.positions == 20 * 64
    assert found.argmax_agreement >= 0.999
    assert found.max_abs_logit_difference < 1e-3
    assert found.is_same
    assert merge.agreement(reference, untouched).argmax_agreement < 0.9


def test_an_update_scaled_a_little_wrongly_is_found(bases):
    adapted = adapted_by(MethodConfig(name="lora", rank=8), bases["bf16"][1])
    reference = list(merge.logits(adapted, ROWS))
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 1.01
    with pytest.raises(FineloopError, match=r"nothing is exported.*99\.9% must agree"):
        merge.require_same(merge.agreement(reference, merge.logits(merge.merge(adapted), ROWS)), "the merged model")


def test_weights_that_are_not_finite_are_not_merged(bases):
    adapted = adapted_by(MethodConfig(name="lora", rank=8), bases["bf16"][1])
    next(weight for name, weight in adapted.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(FineloopError, match="cannot be merged"):
        merge.merge(adapted)


def test_agreement_is_counted_and_the_divergence_is_that_of_the_definition():
    reference = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    other = torch.tensor([[0.0, 2.5, 2.0], [3.0, 1.0, 0.5]])
    p, q = reference.softmax(-1), other.softmax(-1)
    found = merge.agreement([reference], [other])
    assert (found.positions, found.argmax_agreement, found.max_abs_logit_difference) == (2, 0.5, 1.5)
    assert found.mean_kl_nats == pytest.approx(float((p * (p / q).log()).sum() / 2), rel=1e-5)
    assert merge.agreement([reference], [reference]).is_same


def test_rows_that_run_together_have_the_logits_that_they_have_alone(plain_base):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, (length,), generator=generator) for length in (3, 40, 17, 400, 200, 64, 1)]
    for row, found in zip(rows, merge.logits(plain_base, rows), strict=True):
        with torch.inference_mode():
            alone = plain_base(input_ids=row[None]).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "alpha"),
    [
        (MethodConfig(name="lora", rank=8, alpha=12), 12),
        (MethodConfig(name="rslora", rank=16, alpha=6), 24),  # 6 / sqrt(16) is 24 / 16
        (MethodConfig(name="rslora", rank=6, alpha=5), 5 * 6**0.5),
        (MethodConfig(name="vera", rank=24), 24),
    ],
    ids=["lora", "rslora-square", "rslora", "vera"],
)
def test_what_is_lora_becomes_plain_lora_exactly(method, alpha, plain_base, tmp_path):
    adapted = adapted_by(method, plain_base)
    reference = list(merge.logits(adapted, FEW_ROWS))

    build.save(merge.as_lora(adapted), tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = {"peft_type": "LORA", "r": method.r, "lora_alpha": pytest.approx(alpha), "bias": "none"}
    assert {key: config[key] for key in kept} == kept
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert config["base_model_name_or_path"] == "s3://models/tiny"
    plain = PeftModel.from_pretrained(copy.deepcopy(plain_base), tmp_path).eval()
    found = merge.agreement(reference, merge.logits(plain, FEW_ROWS))
    assert found.max_abs_logit_difference < 1e-4
    assert found.argmax_agreement == 1
    assert merge.agreement(reference, merge.logits(plain_base, FEW_ROWS)).argmax_agreement < 0.9


@pytest.mark.parametrize("name", ["dora", "qdora", "dvora"])
def test_magnitudes_are_no_lora(name, plain_base):
    with pytest.raises(UserError, match="no LoRA: use --merged, or --approximate"):
        merge.as_lora(adapted_by(MethodConfig(name=name, rank=8), plain_base))


@pytest.mark.parametrize("name", ["dora", "dvora"])
def test_the_nearest_lora_comes_nearer_with_its_rank_and_leaves_the_base_as_it_was(name, plain_base):
    divergences = []
    for rank in (4, 32, 64):  # 64 is the smaller side of every layer: there is nothing left to lose
        adapted = adapted_by(MethodConfig(name=name, rank=8), plain_base)
        reference = list(merge.logits(adapted, FEW_ROWS))
        near = merge.nearest_lora(adapted, rank=rank)
        divergences.append(merge.agreement(reference, merge.logits(near.eval(), FEW_ROWS)).mean_kl_nats)
        for name_of_weight, weight in near.unload().state_dict().items():
            torch.testing.assert_close(weight, plain_base.state_dict()[name_of_weight], rtol=0, atol=0)
    assert divergences[0] > 3 * divergences[1] > 1e-3
    assert divergences[2] < 1e-9
