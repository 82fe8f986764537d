"""What attention a base is loaded with: transformers' choice, but ours where that is PyTorch's fused kernel and the
base takes kernels that transformers does not ship; wrong ones are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError
from ray_jobs.base import attention, base_model
from ray_jobs.base.architecture import auto_class
from ray_jobs.planning.rehearsal import Rehearsal
from tests.models import zoo


@pytest.mark.parametrize("name", zoo.KINDS)
def test_a_gpu_takes_what_transformers_takes_by_itself(name):  # and packed rows besides
    shape = zoo.KINDS[name].config()
    with torch.device("meta"):
        theirs = auto_class(shape).from_config(shape)
    kernel = theirs.config._attn_implementation
    takes_records = kernel == "sdpa" and type(theirs).is_backend_compatible()
    assert attention.choose(shape, "auto", use_gpu=True) == ("sdpa_records" if takes_records else kernel)


@pytest.mark.parametrize(
    ("name", "on_cpu"),
    [("Llama, tied", "sdpa_float32"), ("Falcon", "sdpa"), ("gpt-oss", "eager")],
)
def test_a_base_is_loaded_with_what_it_has(name, on_cpu, tmp_path):
    zoo.build(name, tmp_path)
    config = ModelConfig(base=str(tmp_path))
    model = base_model.load_model(base_model.resolve(config), config, "bf16", use_gpu=False)
    assert model.config._attn_implementation == on_cpu
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        found, expected = (each.eval()(input_ids=tokens).logits.float() for each in (model, theirs))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_choice_is_taken_where_the_base_has_it():
    llama, falcon = zoo.KINDS["Llama, tied"].config(), zoo.KINDS["Falcon"].config()
    assert attention.choose(llama, "eager", use_gpu=True) == "eager"
    assert attention.choose(llama, "sdpa", use_gpu=True) == "sdpa_records"
    assert attention.choose(falcon, "sdpa", use_gpu=False) == "sdpa"


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("Gemma 2", "sdpa", r"Gemma2ForCausalLM has no attention through PyTorch's fused kernel: .* eager"),
        ("BLOOM", "flash_attention_2", r"BloomForCausalLM has no attention through flash-attn: .* auto"),
    ],
)
def test_a_choice_that_the_base_does_not_have_is_refused_by_the_plan(name, wanted, message):
    with pytest.raises(ConfigError, match=f"model.attention {wanted}: {message}"):
        Rehearsal(zoo.KINDS[name].config(), None, reference=name, attention=wanted)


def test_flash_attention_is_taken_where_its_package_is_installed_and_not_on_a_cpu(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"the package flash-attn is not installed where the workers run"):
        attention.require_installed("flash_attention_2", use_gpu=False)
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    attention.require_installed("flash_attention_2", use_gpu=True)
    llama = zoo.KINDS["Llama, tied"].config()
    assert attention.choose(llama, "flash_attention_2", use_gpu=True) == "flash_attention_2"
    assert attention.choose(llama, "flash_attention_2", use_gpu=False) == "sdpa_float32"
    flash, fused = (
        Rehearsal(llama, None, reference="x", attention=each).step(2, 32, checkpointing=False)
        for each in ("flash_attention_2", "sdpa")
    )
    assert not flash.is_estimate
    assert flash == fused
