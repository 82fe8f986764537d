"""Fused LoRA and products of one row against the formula in numpy, in float64, on what bitsandbytes stores; and against
peft's own layers.
"""

import time

import bitsandbytes
import numpy as np
import peft.tuners.lora.layer
import pytest
import torch
from peft import LoraConfig

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.base import base_model
from ray_jobs.kernels import float32_layers, fused, one_row
from ray_jobs.kernels.door import Kernels
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.training import opening

TOKENS, INPUTS, OUTPUTS, RANK, SCALING = 37, 1000, 1100, 8, 0.75  # a weight larger than a block, and no multiple of one
ONCE = 2.0**-8  # rounding a number to bfloat16 once moves it by at most this share
SUMMED = 1e-5  # and a float32 sum of a thousand terms is off by this share of the sum of their sizes
LOSS_TOLERANCE = 0.02  # nats, as the check before the first step: peft's way rounds to bfloat16 four times for our one
STEPS = 30


def exact(tensor):
    return tensor.detach().double().numpy()


def base_layer(kind, *, wide):
    """A frozen layer with a bias, and its weight as its own library dequantises it."""
    torch.manual_seed(0)
    if kind == "bf16":
        layer = torch.nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)
        weight = exact(layer.weight)
    else:
        layer = bitsandbytes.nn.Linear4bit(INPUTS, OUTPUTS, quant_type="nf4", compute_dtype=torch.bfloat16)
        layer = layer.bfloat16().to("cpu")
        weight = exact(bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    if wide:
        float32_layers.multiply_in_float32(layer)
    return layer.requires_grad_(False), weight


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("wide", [True, False])
def test_value_and_gradients_are_the_formulas(kind, wide):
    layer, W = base_layer(kind, wide=wide)
    lora = LoraConfig(r=RANK, lora_alpha=SCALING * RANK)
    adapted = peft.tuners.lora.layer.Linear(layer, "default", lora, r=RANK, lora_alpha=SCALING * RANK).bfloat16()
    A, B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    torch.nn.init.normal_(B, std=0.05)
    fused.adopt(adapted)
    assert type(adapted) is fused.Linear
    x = torch.randn(1, TOKENS, INPUTS).bfloat16().requires_grad_()
    y, g = adapted(x), torch.randn(1, TOKENS, OUTPUTS).bfloat16()
    assert type(y.grad_fn).__name__ == "LoraProductBackward"
    y.backward(g)

    x_, g_, A_, B_, b_ = exact(x)[0], exact(g)[0], exact(A), exact(B), exact(layer.bias)
    hidden, back = x_ @ A_.T, SCALING * g_ @ B_
    roundings = 1 if wide else 4  # in bfloat16 each of the products is rounded by itself

    def assert_close(found, expected, sizes):
        assert found.dtype == torch.bfloat16
        step = roundings * ONCE * (np.abs(expected) if wide else np.sqrt((expected**2).mean()) + np.abs(expected))
        assert (np.abs(exact(found).reshape(expected.shape) - expected) <= step + SUMMED * sizes).all()

    assert_close(
        y,
        x_ @ W.T + b_ + SCALING * hidden @ B_.T,
        np.abs(x_) @ np.abs(W.T) + np.abs(b_) + np.abs(x_) @ np.abs(A_.T) @ np.abs(B_.T),
    )
    assert_close(x.grad, g_ @ W + back @ A_, np.abs(g_) @ np.abs(W) + np.abs(g_) @ np.abs(B_) @ np.abs(A_))
    assert_close(A.grad, back.T @ x_, (np.abs(g_) @ np.abs(B_)).T @ np.abs(x_))
    assert_close(B.grad, SCALING * g_.T @ hidden, np.abs(g_.T) @ (np.abs(x_) @ np.abs(A_.T)))


def fresh(folder, base_format, matmul_dtype, *, dense_base=False):
    """A base with its adapter, as a worker trains it."""
    toml = f'[adapter]\nname = "a"\n[model]\nbase = "{folder}"\n[data]\nsource = "none"\n[method]\nname = "lora"\n'
    config: RunConfig = config_file.loads(toml, ["method.rank=4", f"method.base={base_format}"])
    adapted = opening.assemble(config, base_model.resolve(config.model), use_gpu=False, kernels=Kernels(matmul_dtype))
    if dense_base:
        float32_layers.widen(adapted, matmul_dtype)
    return adapted


def trained(adapted, *, is_fused=True) -> list[float]:
    """Losses of a training in a plain loop, with weights of 16 bits and float32 masters as DeepSpeed has them."""
    if not is_fused:
        for module in adapted.modules():
            module.__class__ = {new: old for old, new in fused.LAYERS.items()}.get(type(module), type(module))
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=5e-3)
    ids = torch.randint(200, (8, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        loss = answer_nll(adapted, ids, ids).mean()
        losses.append(loss.item())
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        for master, weight in zip(masters, weights, strict=True):
            weight.data.copy_(master)
    return losses


@pytest.mark.parametrize(
    ("base_format", "dtype"), [pytest.param("nf4", "bfloat16", marks=pytest.mark.slow), ("int8", "float32")]
)
def test_a_training_learns_as_with_pefts_layers(tiny_base, base_format, dtype):
    ours = trained(fresh(tiny_base, base_format, dtype))
    pefts = trained(fresh(tiny_base, base_format, dtype), is_fused=False)
    assert pefts[-1] < pefts[0] - 0.5
    assert ours == pytest.approx(pefts, abs=LOSS_TOLERANCE)
    assert ours[1:] != pefts[1:]  # they did go two ways
    dense = fresh(tiny_base, base_format, dtype, dense_base=True)
    quantised = bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt
    assert not any(isinstance(module, quantised) for module in dense.modules())
    assert trained(dense) == ours  # to the bit


def test_on_an_accelerator_what_keeps_nothing_for_a_way_back_goes_pefts_way():
    layer = torch.nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    adapted = peft.tuners.lora.layer.Linear(layer, "default", LoraConfig(r=RANK), r=RANK).bfloat16()
    fused.adopt(adapted)
    x = torch.randn(1, TOKENS, INPUTS, dtype=torch.bfloat16, device="meta")
    assert type(adapted(x).grad_fn).__name__ == "LoraProductBackward"
    with torch.no_grad():
        assert fused.adapted(adapted, x) is None


def adapted_layer(*, by_vector=True):
    layer, _ = base_layer("bf16", wide=False)
    lora = LoraConfig(r=RANK, lora_alpha=SCALING * RANK)
    adapted = peft.tuners.lora.layer.Linear(layer, "default", lora, r=RANK, lora_alpha=SCALING * RANK).bfloat16()
    torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.05)
    model = torch.nn.ModuleDict({"adapted": adapted, "head": torch.nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)})
    fused.adopt(model)
    one_row.convert(model, by_vector=by_vector)
    return model


@pytest.mark.parametrize("by_vector", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
@torch.inference_mode()
def test_a_row_is_multiplied_as_the_formula_says(disabled, by_vector):
    model = adapted_layer(by_vector=by_vector)
    layer, head = model["adapted"], model["head"]
    assert (type(layer), type(head)) == (one_row.AdaptedLinear, one_row.Linear if by_vector else torch.nn.Linear)
    assert type(layer.get_base_layer()) is torch.nn.Linear  # which `fused` knows by its type
    layer.enable_adapters(not disabled)
    x = torch.randn(1, 1, INPUTS).bfloat16()
    A, B = (exact(getattr(layer, f"lora_{which}")["default"].weight) for which in "AB")
    base = layer.get_base_layer()
    update = 0 if disabled else SCALING * exact(x)[0] @ A.T @ B.T
    for found, expected in (
        (layer(x), exact(x)[0] @ exact(base.weight).T + exact(base.bias) + update),
        (head(x), exact(x)[0] @ exact(head.weight).T + exact(head.bias)),
    ):
        assert found.dtype == torch.bfloat16
        assert found.shape == (1, 1, OUTPUTS)
        size = np.sqrt((expected**2).mean()) + np.abs(expected)
        assert (np.abs(exact(found)[0] - expected) <= 4 * ONCE * size).all()


@torch.inference_mode()
def test_more_rows_than_one_go_as_they_did():
    model = adapted_layer()
    x = torch.randn(2, 3, INPUTS).bfloat16()
    found = model["adapted"](x), model["head"](x)
    model["adapted"].__class__, model["head"].__class__ = fused.Linear, torch.nn.Linear
    assert torch.equal(found[0], model["adapted"](x))
    assert torch.equal(found[1], model["head"](x))


@pytest.mark.parametrize("slow", ["vector", "matrix"])
def test_what_is_slower_here_is_not_taken(slow, monkeypatch):
    kernel, times = (torch, "mv") if slow == "vector" else (one_row, "_matrix"), []
    product = getattr(*kernel)

    def slowed(weight, x_I):
        times.append(time.sleep(0.02))
        return product(weight, x_I)

    monkeypatch.setattr(*kernel, slowed)
    weights = [torch.randn(64, 64).bfloat16(), torch.randn(64, 64)]  # the second is none of 16 bits
    assert one_row.vectors_win(weights) is (slow == "matrix")
    assert len(times) == one_row.REPEATS
