"""Which layers get an adapter, on tiny models of transformers' own architectures."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from components.config.schema import MethodConfig
from components.shared.errors import ConfigError
from ray_jobs.adapters import build
from ray_jobs.adapters.build import find, left_dense
from ray_jobs.base.architecture import auto_class
from tests.models import zoo
from tests.models.bases import dense, load, logits
from tests.models.tiny_version import randomise
from tests.models.zoo import on_no_device


def attached(name: str, **method: object):
    lora = MethodConfig(name="lora", rank=4, **method)
    with torch.device("meta"):
        return build.attach(on_no_device(name), lora, base_reference=name, seed=0)


def trained_in(adapted) -> set[str]:
    """The parts of a model that hold what is trained, by the names above the layers."""
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    return {name.removeprefix("base_model.model.").partition(".layers.")[0] for name in names}


def test_of_a_model_that_sees_only_what_reads_text_is_adapted():
    assert trained_in(attached("Gemma 3, with vision")) == {"model.language_model"}
    # Named, q_proj is a layer of the vision tower too.
    named = attached("Gemma 3, with vision", target_modules=["q_proj", "v_proj"])
    assert trained_in(named) == {"model.language_model"}
    assert len(named.targeted_module_names) == 2 * 2
    assert trained_in(attached("Gemma 3, with vision", target_modules=r".*\.q_proj")) == {"model.language_model"}


@pytest.mark.parametrize("wanted", [["q_proj"], r".*\.q_proj"])
def test_layers_are_written_as_the_config_has_them_where_that_reaches_no_other(wanted):
    written = attached("Llama, tied", target_modules=wanted).peft_config["default"].target_modules
    assert written == (set(wanted) if isinstance(wanted, list) else wanted)


def test_a_pattern_that_goes_back_and_forth_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(build, "PATTERN_S", 0.4)
    with pytest.raises(ConfigError, match=r"method\.target_modules '.*' does not come to an end in 0 s"):
        attached("Llama, tied", target_modules="([a-z_0-9.]+)+!")


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Llama 4, text"])
def test_experts_are_adapted_with_the_other_layers_and_the_router_is_not(name):
    adapted = attached(name)
    assert {key.rpartition(".")[2] for key in adapted.targeted_parameter_names} == {"gate_up_proj", "down_proj"}
    assert len(adapted.targeted_parameter_names) == 2 * 2
    modules = {key.rpartition(".")[2] for key in adapted.targeted_module_names}
    assert modules >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any("router" in key or key.endswith("gate") for key in adapted.targeted_module_names)


def test_named_experts_are_adapted_and_nothing_beside_them():
    assert not attached("gpt-oss", target_modules=["q_proj"]).targeted_parameter_names
    experts = attached("gpt-oss", target_modules=["experts.down_proj"])
    assert not experts.targeted_module_names
    assert {key.rpartition(".")[2] for key in experts.targeted_parameter_names} == {"down_proj"}


def test_a_router_is_adapted_where_it_is_named_and_its_class_allows():
    routers = attached("Mixtral", target_modules=["gate"]).targeted_parameter_names
    assert any(key.endswith("gate.weight") for key in routers)
    with pytest.raises(ConfigError, match=r"names model\.layers\.0\.feed_forward\.router of .* a Llama4Router"):
        attached("Llama 4, text", target_modules=["q_proj", "router"])


@pytest.mark.parametrize("adapter", ["dora", "vera"])
def test_experts_take_no_adapter_but_lora_and_the_other_layers_take_all(adapter):
    message = rf"method\.adapter {adapter} has no form for the experts of gpt-oss.* method\.target_modules=\['k_proj', "
    with pytest.raises(ConfigError, match=message):
        attached("gpt-oss", adapter=adapter)
    others = ["k_proj", "o_proj", "q_proj", "v_proj"]  # what the message says
    assert len(attached("gpt-oss", adapter=adapter, target_modules=others).targeted_module_names) == 2 * 4


def test_what_gemma_3n_reads_by_itself_while_it_trains_is_neither_adapted_nor_quantised(tmp_path):
    model = zoo.on_no_device("Gemma 3n")
    wanted = find(model, MethodConfig(name="lora"), base_reference="x").modules
    assert any(name.endswith("altup.modality_router") for name in wanted)
    assert not any("_coefs" in name for name in wanted)
    zoo.build("Gemma 3n", tmp_path)
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in load(tmp_path, "nf4").named_modules()}
    assert (kinds["correction_coefs"], kinds["prediction_coefs"], kinds["lm_head"]) == ("Linear",) * 3
    assert kinds["modality_router"] == kinds["q_proj"] == "Linear4bit"


def test_experts_take_no_dropout():
    with pytest.raises(ConfigError, match=r"method\.dropout 0\.1 cannot be applied to the experts of Mixtral"):
        attached("Mixtral", dropout=0.1)
    assert attached("Mixtral", dropout=0.1, target_modules=["q_proj"]).targeted_module_names


def test_a_base_of_which_most_would_stay_unquantised_is_refused_with_the_share():
    # Mixtral 8x7B's own sizes: 45.1 of 46.7 billion parameters are experts (32 x 8 x 3 x 4096 x 14336).
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000}
    model = on_no_device("Mixtral", **shape)
    with pytest.raises(ConfigError, match=r"method\.base int8 quantises no fused experts, .* they are 97%, .*=bf16"):
        find(model, MethodConfig(name="lora", base="int8"), base_reference="Mixtral")
    with pytest.raises(ConfigError, match=r"method\.base nf4 quantises no FalconLinear, and of Falcon they are \d\d%"):
        find(on_no_device("Falcon"), MethodConfig(name="qlora"), base_reference="Falcon")
    assert find(on_no_device("Falcon"), MethodConfig(name="lora"), base_reference="Falcon").modules


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("Llama, tied", "load_in_8bit"),
        ("GPT-2", "load_in_4bit"),
        ("Gemma 3, with vision", "load_in_4bit"),
        ("Falcon", "load_in_8bit"),
    ],
)
def test_what_transformers_gives_bitsandbytes_none_of_is_known_before(name, setting, tmp_path):
    zoo.build(name, tmp_path)
    quantisation = BitsAndBytesConfig(**{setting: True})
    theirs = auto_class(zoo.KINDS[name].config()).from_pretrained(tmp_path, quantization_config=quantisation)
    quantised = any(isinstance(module, Linear4bit | Linear8bitLt) for module in theirs.get_decoder().modules())
    assert quantised == (not left_dense(on_no_device(name)))


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", r".*(lm_head|q_proj)"])
def test_a_head_that_is_the_embeddings_too_is_not_adapted(layer):
    build = layer if "*" in layer else ["q_proj", layer]
    with pytest.raises(ConfigError, match=r"are one weight in Llama, tied: .* Leave both out"):
        attached("Llama, tied", target_modules=build)
    assert len(attached("Llama, untied", target_modules=build).targeted_module_names) == 3


def test_an_experts_adapter_is_written_in_the_same_order_and_read_by_plain_peft(tmp_path):
    base = zoo.build("Mixtral", tmp_path / "base")
    adapted = build.attach(dense(base), MethodConfig(name="lora", rank=4), base_reference="x", seed=0)
    randomise(adapted)
    build.save(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    plain = PeftModel.from_pretrained(dense(base), tmp_path / "adapter")
    assert torch.equal(logits(plain, 24), logits(adapted, 24))
    assert not torch.equal(logits(plain, 24), logits(dense(base), 24))


@pytest.mark.parametrize("layers", [2, 6])  # from twenty layers on peft looks for short names that mean the same
def test_all_linear_is_written_as_peft_writes_it(layers):
    with torch.device("meta"):
        bases = [on_no_device("Llama, tied", num_hidden_layers=layers) for _ in range(2)]
        theirs = get_peft_model(bases[0], LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        ours = build.attach(bases[1], MethodConfig(), base_reference="x", seed=0)
    found, expected = (each.peft_config["default"] for each in (ours, theirs))
    assert found.target_modules == expected.target_modules
    assert found.target_parameters == expected.target_parameters


def test_a_name_that_fits_no_layer_is_refused_beside_one_that_does():
    with pytest.raises(ConfigError, match=r"\['nonsense'\] fits no layer of Llama, tied, whose layers .* q_proj"):
        attached("Llama, tied", target_modules=["q_proj", "nonsense"])
