import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from components.shared.config import MethodConfig
from components.shared.errors import ConfigError
from components.shared.methods import METHODS
from ray_jobs.adapters import build

REFERENCE = "s3://models/tiny"


def plain_base(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapted_base(path: Path, method: MethodConfig, *, seed: int = 0):
    return build.attach(plain_base(path), method, base_reference=REFERENCE, seed=seed).eval()


def fill_b(model) -> None:
    """An update that does something, as after training."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_saved_files_give_peft_the_same_logits(name, tiny_base, tmp_path):
    model = adapted_base(tiny_base, MethodConfig(name=name, rank=4))
    fill_b(model)
    build.save(model, tmp_path)
    input_ids = torch.arange(12)[None]
    plain = PeftModel.from_pretrained(plain_base(tiny_base), tmp_path).eval()
    with torch.inference_mode():
        ours, theirs = model(input_ids=input_ids).logits, plain(input_ids=input_ids).logits
        untouched = plain_base(tiny_base)(input_ids=input_ids).logits
    torch.testing.assert_close(theirs, ours)
    assert (ours - untouched).abs().max() > 0.1


def test_a_version_is_two_files_that_name_the_base_and_no_folder_of_this_machine(tiny_base, tmp_path):
    build.save(adapted_base(tiny_base, MethodConfig(rank=4)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == REFERENCE
    assert str(tiny_base) not in text


@pytest.mark.parametrize(
    ("method", "spelled"),
    [
        (MethodConfig(name="lora", rank=4), {"r": 4, "lora_alpha": 8.0, "use_rslora": False, "use_dora": False}),
        (MethodConfig(name="rslora", rank=4, alpha=3), {"lora_alpha": 3.0, "use_rslora": True, "use_dora": False}),
        (
            MethodConfig(name="qdora", dropout=0.1),
            {"r": 16, "lora_dropout": 0.1, "use_rslora": False, "use_dora": True},
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_row_of_the_table_is_spelled_as_peft_spells_it(method, spelled, tiny_base, tmp_path):
    build.save(adapted_base(tiny_base, method), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: saved[key] for key in spelled} == spelled
    assert saved["task_type"] == "CAUSAL_LM"


def test_a_fresh_adapter_changes_nothing_yet(tiny_base):
    input_ids = torch.arange(12)[None]
    with torch.inference_mode():
        fresh = adapted_base(tiny_base, MethodConfig(rank=4))(input_ids=input_ids).logits
        torch.testing.assert_close(fresh, plain_base(tiny_base)(input_ids=input_ids).logits)


def test_only_the_adapter_trains_and_every_layer_but_the_head_has_one(tiny_base):
    model = adapted_base(tiny_base, MethodConfig(rank=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in trained)


def test_the_seed_alone_decides_the_first_weights(tiny_base):
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # whatever was drawn before
        weights = dict(adapted_base(tiny_base, MethodConfig(rank=4), seed=seed).named_parameters())
        return next(weight for name, weight in weights.items() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_named_layers_alone_are_adapted(tiny_base):
    model = adapted_base(tiny_base, MethodConfig(rank=4, target_modules=["q_proj"]))
    assert all("q_proj" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("targets", [["no_such_layer"], "no_such_layer"])
def test_layers_that_the_base_does_not_have_are_the_users_mistake(targets, tiny_base):
    with pytest.raises(ConfigError, match=r"method\.target_modules .* does not fit s3://models/tiny"):
        adapted_base(tiny_base, MethodConfig(rank=4, target_modules=targets))
