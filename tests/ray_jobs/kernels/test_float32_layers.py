"""Products in float32 against numpy in float64, that no product of bfloat16 is left in any method, and bases that are
widened once and for all.

numpy multiplies what the layers store, read by torch's and bitsandbytes' own functions; nothing of ours is in between.
"""

from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from components.config.schema import ModelConfig, RunConfig
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels import door, float32_layers
from ray_jobs.kernels.door import Kernels
from ray_jobs.text.answer_loss import answer_nll
from tests.models.spec import changed

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
    layer = bitsandbytes.nn.Linear4bit(INPUTS, OUTPUTS, quant_type="nf4", compute_dtype=torch.bfloat16)
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
    ("name", "base_format"), [("lora", "int8"), ("qdora", "nf4"), ("vera", "bf16"), ("dvora", "nf4")]
)
def test_no_method_is_left_with_a_product_in_16_bits(name: str, base_format: str, config: RunConfig):
    config = changed(config, f"method.name={name}", f"method.base={base_format}", "method.dropout=0.1")
    products = trained_once(config, base_model.resolve(config.model))
    assert products.in_16_bits == []
    assert products.in_float32 > 50


def loaded(folder, base_format, matmul_dtype):
    config = ModelConfig(base=str(folder))
    base = base_model.resolve(config)
    return door.load_model(base, config, base_format, Kernels(matmul_dtype), use_gpu=False).eval()


@pytest.mark.parametrize(
    ("base_format", "matmul_dtype"), [("nf4", "float32"), ("int8", "float32"), ("bf16", "float32"), ("nf4", "bfloat16")]
)
def test_a_widened_base_answers_as_before(tiny_base, base_format, matmul_dtype):
    model = loaded(tiny_base, base_format, matmul_dtype)
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        assert float32_layers.widen_if_room(model, matmul_dtype)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    layers = [*model.model.layers.modules()]
    dtypes = {layer.weight.dtype for layer in layers if isinstance(layer, torch.nn.Linear)}
    assert dtypes == {torch.float32 if matmul_dtype == "float32" else torch.bfloat16}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16  # and so what its layers hand on


def test_a_base_that_memory_has_no_room_for_stays_as_it_is(tiny_base, monkeypatch):
    model = loaded(tiny_base, "nf4", "float32")
    before = [type(module) for module in model.modules()]
    needed = 4 * sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    monkeypatch.setattr(float32_layers, "available_bytes", lambda: int(4 * needed / float32_layers.MEMORY_SHARE) - 8)
    assert not float32_layers.widen_if_room(model, "float32", sharers=4)
    assert [type(module) for module in model.modules()] == before
    monkeypatch.setattr(float32_layers, "available_bytes", lambda: int(4 * needed / float32_layers.MEMORY_SHARE) + 8)
    assert float32_layers.widen_if_room(model, "float32", sharers=4)


def test_int8_that_is_multiplied_in_bfloat16_stays_int8(tiny_base):
    model = loaded(tiny_base, "int8", "bfloat16")
    assert not float32_layers.widen_if_room(model, "bfloat16")
