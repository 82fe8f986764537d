"""Products of one row against the formula in numpy, in float64, with an adapter and without one."""

import time

import numpy as np
import peft.tuners.lora.layer
import pytest
import torch
from peft import LoraConfig

from ray_jobs.kernels import fused, one_row

INPUTS, OUTPUTS, RANK, SCALING = 1000, 1100, 8, 0.75
ONCE = 2.0**-8  # rounding a number to bfloat16 once moves it by at most this share


def exact(tensor):
    return tensor.detach().double().numpy()


def adapted_layer(*, by_vector=True):
    torch.manual_seed(0)
    layer = torch.nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16).requires_grad_(False)
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
