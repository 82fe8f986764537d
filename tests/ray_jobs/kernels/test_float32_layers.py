"""Products in float32 against numpy in float64, and that no product of bfloat16 is left in any method.

numpy multiplies what the layers store, read by torch's and bitsandbytes' own functions; nothing of ours is in between.
"""

from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels import door, float32_layers
from ray_jobs.kernels.door import Kernels
from ray_jobs.text.answer_loss import answer_nll

HALF_STEP = 2.0**-8  # bfloat16 has 8 significant bits: rounding once moves a number by at most this share of it
SUMMED = 1e-5  # and what a float32 sum of a thousand terms may be off by, as a share of the sum of their sizes
# Larger than a block, and no multiple of one.
INPUTS, OUTPUTS, ROWS = 1000, 1100, 7

FLOAT32 = Kernels("float32")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_rounded_once(found: torch.Tensor, left: np.ndarray, right: np.ndarray, added: Any = 0.0) -> None:
    """`found` is left @ right + added, as precise as bfloat16 can say it."""
    assert found.dtype == torch.bfloat16
    expected, sizes = left @ right + added, np.abs(left) @ np.abs(right) + np.abs(added)
    assert (np.abs(exact(found) - expected) <= HALF_STEP * np.abs(expected) + SUMMED * sizes).all()


def linear() -> tuple[torch.nn.Module, np.ndarray]:
    layer = torch.nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    return layer, exact(layer.weight)


def conv1d() -> tuple[torch.nn.Module, np.ndarray]:
    layer = Conv1D(OUTPUTS, INPUTS).bfloat16()
    torch.nn.init.normal_(layer.bias)
    return layer, exact(layer.weight).T


def nf4() -> tuple[torch.nn.Module, np.ndarray]:
    layer = bitsandbytes.nn.Linear4bit(
        INPUTS, OUTPUTS, quant_type="nf4", compress_statistics=True, compute_dtype=torch.bfloat16
    )
    layer = layer.bfloat16().to("cpu")
    quantized = layer.weight if layer.weight.quant_state else layer.weight._quantize("cpu")
    return layer, exact(bitsandbytes.functional.dequantize_4bit(quantized.data, quantized.quant_state))


def int8() -> tuple[torch.nn.Module, np.ndarray]:
    layer = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False, threshold=6.0).bfloat16()
    layer.weight = layer.weight._quantize("cpu") if layer.weight.CB is None else layer.weight
    return layer, exact(layer.weight.CB) * exact(layer.weight.SCB)[:, None] / 127


@pytest.mark.parametrize("make", [linear, conv1d, nf4, int8])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_multiplies_both_ways_as_precisely_as_bfloat16_can_say(make, training):
    layer, weight_OI = make()
    layer.train(training).requires_grad_(False)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items() if isinstance(tensor, torch.Tensor)}
    float32_layers.multiply_in_float32(layer)
    x = random(2, ROWS, INPUTS, seed=1).requires_grad_()
    gradient = random(2, ROWS, OUTPUTS, seed=2)
    found = layer(x)
    found.backward(gradient)
    assert_rounded_once(found, exact(x), weight_OI.T, exact(layer.bias))
    assert_rounded_once(x.grad, exact(gradient), weight_OI)
    for name, tensor in stored.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
        assert layer.state_dict()[name].dtype == tensor.dtype


def test_what_is_trained_gets_its_gradient_as_precisely():
    layer = torch.nn.Linear(INPUTS, 16, dtype=torch.bfloat16)
    float32_layers.multiply_in_float32(layer)
    x, gradient = random(3, ROWS, INPUTS, seed=3), random(3, ROWS, 16, seed=4)
    layer(x).backward(gradient)
    rows, gradients = exact(x).reshape(-1, INPUTS), exact(gradient).reshape(-1, 16)
    assert_rounded_once(layer.weight.grad, gradients.T, rows)
    assert_rounded_once(layer.bias.grad, np.ones(len(rows)), gradients)


def test_a_float32_layer_stays_as_exact_as_it_was():
    layer = torch.nn.Linear(INPUTS, OUTPUTS)
    x = torch.randn(ROWS, INPUTS)
    float32_layers.multiply_in_float32(layer)
    expected = exact(x) @ exact(layer.weight).T + exact(layer.bias)
    terms = np.abs(exact(x)) @ np.abs(exact(layer.weight)).T + np.abs(exact(layer.bias))
    assert (np.abs(exact(layer(x)) - expected) / terms).max() < 2.0**-24 * np.sqrt(INPUTS)


def test_a_widened_weight_gives_the_same_to_the_bit():
    """One that is read in several blocks, such as an output head, and its gradients."""
    narrow = random(5000, INPUTS, seed=5)
    x, gradient = random(ROWS, INPUTS, seed=6), random(ROWS, 5000, seed=7)
    assert narrow.numel() > 2 * float32_layers.BLOCK_ELEMENTS

    def both_ways(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.clone().requires_grad_()
        product = float32_layers.linear(rows, weight)
        product.backward(gradient)
        return product.detach(), rows.grad

    for narrow_way, wide_way in zip(both_ways(narrow), both_ways(narrow.float()), strict=True):
        assert torch.equal(narrow_way, wide_way)


def test_nothing_widened_is_kept_between_the_passes():
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    float32_layers.multiply_in_float32(layer)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(random(ROWS, INPUTS, seed=5).requires_grad_())
    assert kept == []  # of a frozen layer not even its input


class Products(TorchDispatchMode):
    """Collects the matrix products of 16-bit operands that PyTorch is asked for, forward and backward."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "einsum", "_grouped_mm")

    def __init__(self) -> None:
        super().__init__()
        self.in_16_bits: list[str] = []
        self.in_float32 = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            if dtypes & {torch.bfloat16, torch.float16}:
                self.in_16_bits.append(str(function))
            self.in_float32 += torch.float32 in dtypes
        return function(*args, **(kwargs or {}))


def trained_once(config: RunConfig, base: base_model.Base) -> Products:
    """One step with dropout, and one pass in evaluation."""
    model = door.load_model(base, config.model, config.method.row.base, FLOAT32, use_gpu=False)
    adapted = FLOAT32.adopt(build.attach(model, config.method, base_reference="", seed=0)).train()
    build.to_training(adapted, torch.bfloat16)
    tokens = torch.arange(24).reshape(2, 12)
    with Products() as products:
        answer_nll(adapted, tokens, tokens).sum().backward()
        with torch.no_grad():
            answer_nll(adapted.eval(), tokens, tokens)
            adapted.generate(tokens, max_new_tokens=2, do_sample=False)
    return products


@pytest.mark.parametrize(
    ("name", "base_format"),
    [
        ("lora", "bf16"),
        ("qlora", "nf4"),
        ("rslora", "int8"),
        ("dora", "int8"),
        ("qdora", "nf4"),
        ("vera", "bf16"),
        ("dvora", "nf4"),
    ],
)
def test_no_method_is_left_with_a_product_in_16_bits(name: str, base_format: str, config: RunConfig, tiny_base: Path):
    changes = [f"method.name={name}", f"method.base={base_format}", "method.dropout=0.1"]
    config = config_file.loads(config_file.dumps(config), changes)
    products = trained_once(config, base_model.resolve(config.model))
    assert products.in_16_bits == []
    assert products.in_float32 > 50
