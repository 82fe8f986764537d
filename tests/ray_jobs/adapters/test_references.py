"""Every adapter against the formula of its paper, written out densely in float64: outputs and all gradients."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.config.schema import MethodConfig
from ray_jobs.adapters import build

RANK, ALPHA = 4, 6.0
ADAPTERS = {  # with a dense base and with a 4-bit one
    "lora": MethodConfig(name="lora", rank=RANK, alpha=ALPHA),
    "rslora": MethodConfig(name="rslora", rank=RANK, alpha=ALPHA),
    "dora": MethodConfig(name="dora", rank=RANK, alpha=ALPHA),
    "rslora and dora": MethodConfig(name="dora", scaling="rslora", rank=RANK, alpha=ALPHA),
    "vera": MethodConfig(name="vera", rank=RANK),
    "dvora": MethodConfig(name="dvora", rank=RANK),
}
SCALING = {"lora": ALPHA / RANK, "dora": ALPHA / RANK}
SCALING |= {"rslora": ALPHA / RANK**0.5, "rslora and dora": ALPHA / RANK**0.5}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTISATION = {
    "dense": None,
    "nf4": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def updated_weight(name: str, weight: Tensor, v: dict[str, Tensor]) -> Tensor:
    """W' by the papers: LoRA 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, VeRA 2310.11454."""
    if "vera" in name or "dvora" in name:
        update = torch.diag(v["b"]) @ v["B"] @ torch.diag(v["d"]) @ v["A"]
    else:
        update = SCALING[name] * v["B"] @ v["A"]
    if "m" not in v:
        return weight + update
    direction = weight + update
    return v["m"][:, None] * direction / direction.norm(dim=1, keepdim=True).detach()


def adapted_layer(method: MethodConfig, path: Path, base: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A layer of the tiny model with an update of some size, and that update's tensors by their names in the papers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=QUANTISATION[base])
    adapted = build.attach(model, method, base_reference="tiny", seed=0).train()
    # Not square, and of VeRA's shared matrices it takes a part of each.
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
    names = {
        "A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight",
        "b": "vera_lambda_b.default", "d": "vera_lambda_d.default",
    }  # fmt: skip
    if method.row.adapter == "dvora":
        names["m"] = "vera_lambda_m.default"
    found = dict(layer.named_parameters())
    vectors = {short: found[name] for short, name in names.items() if name in found}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for short, vector in vectors.items():
            noise = torch.randn(vector.shape, generator=generator)
            vector.copy_(vector * (1 + 0.2 * noise) if short == "m" else 0.3 * noise)
    if method.row.adapter in ("vera", "dvora"):
        vectors["A"] = layer.vera_A["default"][:, : layer.in_features]
        vectors["B"] = layer.vera_B["default"][: layer.out_features]
    return layer, vectors


def dequantised(weight: Tensor) -> Tensor:
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, Int8Params):
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight


@pytest.mark.parametrize("base", QUANTISATION)
@pytest.mark.parametrize("name", ADAPTERS)
def test_output_and_gradients_are_those_of_the_papers_formula(name, base, tiny_base):
    layer, vectors = adapted_layer(ADAPTERS[name], tiny_base, base)
    weight = dequantised(layer.get_base_layer().weight)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(2)).requires_grad_()
    theirs = {short: vector.detach().double().requires_grad_(vector.requires_grad) for short, vector in vectors.items()}
    reference_x = x.detach().double().requires_grad_()
    expected = reference_x @ updated_weight(name, weight.detach().double(), theirs).T
    found = layer(x)
    # The update matters, or nothing is compared.
    assert (found - x @ weight.T).abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    found.backward(upstream)
    expected.backward(upstream.double())
    for short, ours, reference in [("x", x, reference_x), *((s, vectors[s], theirs[s]) for s in vectors)]:
        if reference.requires_grad:
            assert reference.grad.abs().max() > 0.1, short
            torch.testing.assert_close(
                ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4, msg=lambda m, s=short: f"{s}: {m}"
            )
    trained = {short for short, vector in vectors.items() if vector.requires_grad}
    all_trained = {"lora": {"A", "B"}, "dora": {"A", "B", "m"}, "vera": {"b", "d"}, "dvora": {"b", "d", "m"}}
    assert trained == all_trained[ADAPTERS[name].row.adapter]
