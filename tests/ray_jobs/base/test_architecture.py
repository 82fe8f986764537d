"""Which bases are language models and by which classes they are loaded; which GPUs know bfloat16 or have kernels.

And what attention a base is loaded with: transformers' choice, but ours where that is PyTorch's fused kernel and the
base takes kernels that transformers does not ship; wrong ones are refused.
"""

import json
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from components.config import config_file
from components.config.ray import GPUS, dtype_on
from components.shared.errors import ConfigError
from ray_jobs.base import architecture, attention, base_model
from ray_jobs.base.architecture import auto_class, require_causal
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.training import zero
from tests.models import zoo
from tests.models.bases import load, logits
from tests.ray_jobs.conftest import CONFIG


@pytest.mark.parametrize(
    ("name", "is_loaded_as"),
    [("Llama, tied", "LlamaForCausalLM"), ("Gemma 3, with vision", "Gemma3ForConditionalGeneration")],
)
def test_a_base_is_loaded_as_what_transformers_saved(name, is_loaded_as, tmp_path):
    zoo.build(name, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [is_loaded_as]
    assert type(load(tmp_path)).__name__ == is_loaded_as


@pytest.mark.parametrize("kind", ["T5Config", "BertConfig", "ViTConfig"])
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


@pytest.mark.parametrize(("gpu", "dtype", "has_flash"), [("T4", "float16", False), ("A100-40G", "bfloat16", True)])
def test_a_gpu_takes_the_dtype_and_attention_that_its_capability_has(gpu, dtype, has_flash, monkeypatch):
    capability = GPUS[gpu].capability
    assert dtype_on("auto", capability) == dtype
    assert [dtype_on(wanted, capability) for wanted in ("bfloat16", "float16")] == ["bfloat16", "float16"]
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert architecture.dtype_here("auto", use_gpu=True) is getattr(torch, dtype)
    assert architecture.dtype_here("auto", use_gpu=False) is torch.bfloat16
    zero.prepare_environment(use_gpu=True)
    with nullcontext() if has_flash else pytest.raises(ConfigError, match=r"no kernels .* 7\.[05], only from 8\.0"):
        zero.prepare_environment(use_gpu=True, attention="flash_attention_2")


@pytest.mark.parametrize(("hip", "built_for"), [("6.4", r"AMD's GPUs \(ROCm\)"), (None, "processors alone")])
def test_a_torch_that_is_not_for_nvidias_gpus_is_refused_by_driver_and_worker(hip, built_for, monkeypatch):
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None, hip=hip))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))  # as PyTorch says of an MI300
    message = f"trains on NVIDIA's GPUs, and torch .* is built for {built_for}: take an image"
    with pytest.raises(ConfigError, match=message):
        attention.require_installed("auto", use_gpu=True)
    with pytest.raises(ConfigError, match=message):
        zero.prepare_environment(use_gpu=True)
    attention.require_installed("auto", use_gpu=False)


@pytest.mark.parametrize("changes", [["ray.gpu=T4"], ["train.dtype=float16"], ["ray.gpu=A10G", "train.dtype=float16"]])
def test_a_base_of_few_bits_is_refused_for_float16_by_plan_and_driver(changes):
    config = config_file.loads(CONFIG.format(base="none"), ["method.name=qlora", "ray.use_gpu=true", *changes])
    plain = zoo.KINDS["Llama, tied"].config()
    assert base_model.fitted(config, plain, pytest.fail) == config
    stored = zoo.KINDS["Llama, tied"].config()
    stored.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(ConfigError, match=r"none is stored in few bits for bfloat16, and train\.dtype is float16"):
        base_model.fitted(config, stored, pytest.fail)
    on_a10g = config_file.loads(CONFIG.format(base="none"), ["method.name=qlora", "ray.use_gpu=true", "ray.gpu=A10G"])
    assert base_model.fitted(on_a10g, stored, pytest.fail) == on_a10g


def test_a_gpu_without_kernels_is_refused_before_a_base_is_fetched_for_it(monkeypatch):
    def ones(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_name=lambda: "Tesla V100"))
    with pytest.raises(ConfigError, match=r"does not run on Tesla V100 .*no kernel image.*: take a newer ray\.gpu"):
        zero.prepare_environment(use_gpu=True)


@pytest.mark.parametrize("name", zoo.KINDS)
def test_a_gpu_takes_what_transformers_takes_by_itself(name):  # and packed rows besides
    shape = zoo.KINDS[name].config()
    with torch.device("meta"):
        theirs = auto_class(shape).from_config(shape)
    kernel = theirs.config._attn_implementation
    takes_records = kernel == "sdpa" and type(theirs).is_backend_compatible()
    assert attention.choose(shape, "auto", use_gpu=True) == ("sdpa_records" if takes_records else kernel)


@pytest.mark.parametrize(
    ("name", "on_cpu"), [("Llama, tied", "sdpa_float32"), ("Falcon", "sdpa"), ("gpt-oss", "eager")]
)
def test_a_base_is_loaded_with_what_it_has(name, on_cpu, tmp_path):
    zoo.build(name, tmp_path)
    model = load(tmp_path)
    assert model.config._attn_implementation == on_cpu
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found, expected = (logits(each, 24).float() for each in (model, theirs))
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
