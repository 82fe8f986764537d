"""Plain LoRA against what it was made from, in float32, as plain peft reads what was saved."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from components.config.schema import MethodConfig
from components.shared.errors import UserError
from ray_jobs.adapters import build, merge
from tests.models.tiny_version import randomise

ROWS = merge.vocabulary_rows(256, count=8, length=64)


@pytest.fixture(scope="module")
def plain_base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def adapted_by(method: MethodConfig, plain_base):
    adapted = build.attach(copy.deepcopy(plain_base), method, base_reference="s3://models/tiny", seed=0)
    randomise(adapted)
    return adapted.eval()


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
    reference = list(merge.logits(adapted, ROWS))

    build.save(merge.as_lora(adapted), tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = {"peft_type": "LORA", "r": method.r, "lora_alpha": pytest.approx(alpha), "bias": "none"}
    assert {key: config[key] for key in kept} == kept
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert config["base_model_name_or_path"] == "s3://models/tiny"
    plain = PeftModel.from_pretrained(copy.deepcopy(plain_base), tmp_path).eval()
    found = merge.agreement(reference, merge.logits(plain, ROWS))
    assert found.max_abs_logit_difference < 1e-4
    assert found.argmax_agreement == 1
    assert merge.agreement(reference, merge.logits(plain_base, ROWS)).argmax_agreement < 0.9


@pytest.mark.parametrize("name", ["dora", "qdora", "dvora"])
def test_magnitudes_are_no_lora(name, plain_base):
    with pytest.raises(UserError, match="no LoRA: use --merged, or --approximate"):
        merge.as_lora(adapted_by(MethodConfig(name=name, rank=8), plain_base))


@pytest.mark.parametrize("name", ["dora", "dvora"])
def test_the_nearest_lora_comes_nearer_with_its_rank_and_leaves_the_base_as_it_was(name, plain_base):
    divergences = []
    for rank in (4, 32, 64):  # 64 is the smaller side of every layer: there is nothing left to lose
        adapted = adapted_by(MethodConfig(name=name, rank=8), plain_base)
        reference = list(merge.logits(adapted, ROWS))
        near = merge.nearest_lora(adapted, rank=rank)
        divergences.append(merge.agreement(reference, merge.logits(near.eval(), ROWS)).mean_kl_nats)
        for name_of_weight, weight in near.unload().state_dict().items():
            torch.testing.assert_close(weight, plain_base.state_dict()[name_of_weight], rtol=0, atol=0)
    assert divergences[0] > 3 * divergences[1] > 1e-3
    assert divergences[2] < 1e-9
