"""Fused decoder layers against transformers' and peft's own, in float64; and a training against theirs."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from ray_jobs.base import attention
from ray_jobs.kernels import float32_layers, fused, fused_attention, fused_layer
from ray_jobs.text import answer_loss
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import TokenizedSplit
from tests.models.splits import split_of
from tests.models.tiny import SHAPE

KINDS = {
    "Llama, biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "Mistral": (MistralConfig, {"sliding_window": 64}),
    "Qwen2": (Qwen2Config, {}),
}
IDS = torch.randint(200, (3, 21), generator=torch.Generator().manual_seed(1))
OF_ONE = 1.5
"""Times the error that peft's layers make in the same dtype: which of few roundings fall well is chance."""


def adapted(kind, dtype, *, base="bf16", matmul_dtype="bfloat16", dropout=0.0, use_dora=False):
    """A model of two layers with an adapter on every product; the same numbers in whatever they are held."""
    config_class, own = KINDS[kind]
    shape = {**SHAPE, "vocab_size": 200, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}
    config = config_class(**shape, **own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register(), dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = (float("norm" in name) + 0.1 * torch.randn(parameter.shape, generator=draw)).bfloat16()
    if base == "nf4":
        quantise(model, keep=dtype is torch.bfloat16)
    model.to(dtype)
    lora = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", lora_dropout=dropout, use_dora=use_dora)
    found = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in found.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=draw)).bfloat16().to(dtype)
    if matmul_dtype == "float32":
        float32_layers.multiply_in_float32(found)
    return found.train()


def quantise(model, *, keep):
    """Every product of the layers in NF4, or dense in what that reads as."""
    how = {"quant_type": "nf4", "compute_dtype": torch.bfloat16, "quant_storage": torch.bfloat16}  # as under ZeRO-3
    for part in [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]:
        for name, linear in list(part.named_children()):
            if isinstance(linear, torch.nn.Linear):
                few = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **how)
                few.load_state_dict(linear.state_dict())
                few.to("cpu")
                if keep:
                    setattr(part, name, few.requires_grad_(False))
                else:
                    linear.weight.data = dequantize_4bit(few.weight.data, few.weight.quant_state)


def adopt(model):
    fused.adopt(model)
    fused_layer.adopt(model)
    return model


def gradients(model):
    """The loss of every token, and the gradients of everything trained, in float64."""
    answer_nll(model, IDS, IDS).mean().backward()
    return {name: each.grad.double() for name, each in model.named_parameters() if each.requires_grad}


def beginning_alike(*, prompt: int) -> TokenizedSplit:
    """Three records with 9 tokens in common, of which all after the first `prompt` are to be learned."""
    rows = [torch.cat([IDS[0, :9], rest]) for rest in (IDS[0, 9:], IDS[1, 9:14], IDS[2, 9:17])]
    return split_of(*((row[:prompt], row[prompt:]) for row in rows))


def goes_fused(model, **inputs) -> bool:
    """Whether each of the two layers goes by the one function."""
    with mock.patch.object(fused_layer.Layer, "apply", side_effect=fused_layer.Layer.apply) as apply:
        model(**{"input_ids": IDS, "use_cache": False, **inputs})
    assert apply.call_count in (0, 2)
    return apply.called


@pytest.mark.parametrize(
    ("kind", "base", "matmul_dtype"),
    [("Qwen2", "bf16", "bfloat16"), ("Mistral", "nf4", "bfloat16"), ("Llama, biased", "nf4", "float32")],
)
def test_gradients_are_nearer_to_float64s_than_pefts(kind, base, matmul_dtype):
    exact = gradients(adapted(kind, torch.float64, base=base))
    pefts = gradients(adapted(kind, torch.bfloat16, base=base, matmul_dtype=matmul_dtype))
    model = adopt(adapted(kind, torch.bfloat16, base=base, matmul_dtype=matmul_dtype))
    assert goes_fused(model)
    ours = gradients(model)
    assert ours.keys() == exact.keys()
    errors = {
        name: [(found[name] - each).norm() / each.norm() for found in (ours, pefts)] for name, each in exact.items()
    }
    assert all(error < OF_ONE * theirs < 0.1 for error, theirs in errors.values())
    assert sum(error**2 for error, _ in errors.values()) < sum(theirs**2 for _, theirs in errors.values())


@pytest.mark.parametrize("matmul_dtype", ["bfloat16", "float32"])
def test_of_long_records_gradients_are_as_near_as_by_transformers_attention_in_16_bits(matmul_dtype, monkeypatch):
    by_onednn = mock.create_autospec(float32_layers.by_onednn, side_effect=float32_layers.by_onednn)
    monkeypatch.setattr(float32_layers, "by_onednn", by_onednn)
    monkeypatch.setattr(fused_attention, "LONG", IDS.shape[1])
    exact = gradients(adapted("Qwen2", torch.float64))
    plain = adapted("Qwen2", torch.bfloat16, matmul_dtype=matmul_dtype)
    plain.config._attn_implementation = "sdpa"
    theirs, ours = gradients(plain), gradients(adopt(adapted("Qwen2", torch.bfloat16, matmul_dtype=matmul_dtype)))
    may_round = [call.kwargs.get("may_round", False) for call in by_onednn.call_args_list]
    assert may_round == [False] * 2 + [matmul_dtype == "bfloat16"] * 2
    errors = [[(found[name] - each).norm() / each.norm() for found in (ours, theirs)] for name, each in exact.items()]
    assert all(error < OF_ONE * own < 0.1 for error, own in errors)


def test_packed_records_have_gradients_as_near():
    """Three records that begin alike: read once, against float64's modules on each in a row of its own."""
    split = beginning_alike(prompt=11)

    def found(model, *, packs: bool) -> dict[str, torch.Tensor]:
        answer_loss.records_nll(model, split, range(3), 0, device=torch.device("cpu"), packs=packs).mean().backward()
        return {name: each.grad.double() for name, each in model.named_parameters() if each.requires_grad}

    exact = found(adapted("Llama, biased", torch.float64), packs=False)
    pefts = found(adapted("Llama, biased", torch.bfloat16), packs=False)
    model = adopt(adapted("Llama, biased", torch.bfloat16))
    row = answer_loss.pack(split, range(3))
    given = {"position_ids": row.packing.positions, "attention_mask": row.packing.mask(), "packing": row.packing}
    assert row.packing.common == 9
    assert goes_fused(model, input_ids=row.input_ids, **given)
    assert not goes_fused(model, attention_mask=torch.ones(3, 1, 21, 21, dtype=torch.bool))  # a mask of another kind
    ours = found(model, packs=True)
    for name, each in exact.items():
        error, theirs = ((gradients[name] - each).norm() / each.norm() for gradients in (ours, pefts))
        assert error < OF_ONE * theirs < 0.1, name


@pytest.mark.parametrize(("prompt", "read"), [(11, 10 + 3 + 6), (14, 7 + 0 + 3), (21, 0)])
def test_of_the_last_layer_no_more_is_computed_than_is_read(prompt, read, monkeypatch):
    forward = mock.create_autospec(fused_layer.Products.forward, side_effect=fused_layer.Products.forward)
    monkeypatch.setattr(fused_layer.Products, "forward", forward)
    model = adopt(adapted("Qwen2", torch.bfloat16, matmul_dtype="float32"))
    found = answer_loss.records_nll(model, beginning_alike(prompt=prompt), range(3), 0, device=torch.device("cpu"))
    found.sum().backward()
    multiplied, row = [len(call.args[1]) for call in forward.call_args_list], 9 + 12 + 5 + 8
    assert multiplied == [row] * 4 + [row, read, read, read]  # the last layer's keys and values are of all tokens
    assert len(found) == read


def test_dense_weights_are_held_once_and_are_what_they_were():
    model, before = adopt(adapted("Qwen2", torch.bfloat16)), adapted("Qwen2", torch.bfloat16).state_dict()
    gradients(model)
    layer = model.get_base_model().model.layers[0]
    attn = layer.self_attn
    assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.v_proj.weight.untyped_storage().data_ptr()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = answer_nll(model, IDS, IDS)
    attn.q_proj.base_layer.weight = torch.nn.Parameter(torch.zeros_like(attn.q_proj.weight), requires_grad=False)
    assert not torch.equal(answer_nll(model, IDS, IDS), first)  # what somebody puts in its place is seen


@pytest.mark.parametrize(
    ("set_up", "inputs"),
    [
        ({"dropout": 0.1}, {}),
        ({"use_dora": True}, {}),
        ({}, {"use_cache": True}),
        ({}, {"attention_mask": torch.tensor([[1] * 21, [1] * 21, [0] * 5 + [1] * 16])}),
    ],
)
def test_what_it_does_not_cover_goes_the_layers_own_way(set_up, inputs):
    assert goes_fused(adopt(adapted("Mistral", torch.bfloat16)))
    assert not goes_fused(adopt(adapted("Mistral", torch.bfloat16, **set_up)), **inputs)


@pytest.mark.parametrize(
    "how", ["no gradients", "disabled", "hooked", "merged", "another kernel", "partly adapted", "recomputed"]
)
def test_a_layer_that_is_more_than_its_products_goes_its_own_way(how):
    model = adopt(adapted("Llama, biased", torch.bfloat16))
    base = model.get_base_model()
    if how == "hooked":
        for layer in base.model.layers:
            layer.mlp.register_forward_hook(lambda *_: None)
    if how == "merged":
        model.merge_adapter()
    if how == "recomputed":
        base.activation_checkpointing_enable({"use_reentrant": False})
    if how == "another kernel":
        base.set_attn_implementation("sdpa")
    if how == "partly adapted":
        for layer in base.model.layers:
            layer.mlp.up_proj = layer.mlp.up_proj.base_layer
    with {"disabled": model.disable_adapter(), "no gradients": torch.no_grad()}.get(how, nullcontext()):
        assert not goes_fused(model)


def test_a_base_in_few_bits_is_read_as_it_is_stored():
    model = adopt(adapted("Mistral", torch.bfloat16, base="nf4"))
    gradients(model)
    with model.disable_adapter():
        plain = answer_nll(model, IDS, IDS)
    untouched = adapted("Mistral", torch.bfloat16, base="nf4")
    with untouched.disable_adapter():
        assert torch.equal(plain, answer_nll(untouched, IDS, IDS))
