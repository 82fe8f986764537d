"""The base in memory: bfloat16, NF4 and int8; and folders whose weights are quantised already, which are loaded as they
are, widened, or refused; never as something else. Four bits by the kernel for processors, against bitsandbytes' own and
against what arXiv:2305.14314 says of NF4.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from components.config.schema import MethodConfig, ModelConfig
from components.shared.errors import ConfigError, JobError
from ray_jobs.adapters import build
from ray_jobs.base import base_model, four_bits
from ray_jobs.planning.rehearsal import Rehearsal
from tests.models import zoo
from tests.models.bases import load, rewritten

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""The values of four bits: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3."""


def test_a_bf16_base_is_bfloat16_and_frozen(tiny_base):
    model = load(tiny_base)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_an_nf4_base_holds_four_bits_a_weight_doubly_quantised(tiny_base):
    model = load(tiny_base, "nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.bfloat16  # the storage's
        assert layer.weight.numel() * 4 == layer.in_features * layer.out_features
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_an_nf4_base_is_never_repacked_by_a_measurement_on_cpu(tiny_base):
    model = load(tiny_base, "nf4").eval()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    before = [layer.weight.data.view(torch.uint8).clone() for layer in layers]  # as bfloat16 some are not a number
    with torch.inference_mode():
        model(input_ids=torch.arange(64)[None])
    for layer, weight in zip(layers, before, strict=True):
        assert layer.support_avx512bf16_for_cpu is False
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(layer.weight.data.view(torch.uint8), weight)
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).requires_grad_()
    model.train()(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("base_format", ["nf4", "int8"])
def test_dora_reads_a_quantised_weight_and_leaves_it_where_it_is(tiny_base, base_format):
    # By itself peft would put a copy in its place at every pass, which has no scales and is nothing that ZeRO-3 knows.
    method = MethodConfig(name="dora", rank=4)
    adapted = build.attach(load(tiny_base, base_format), method, base_reference="tiny", seed=0).train()
    before = dict(adapted.named_parameters())
    logits = [adapted(input_ids=torch.arange(16)[None]).logits for _ in range(3)]
    assert torch.equal(logits[0], logits[2])
    assert all(parameter is before[name] for name, parameter in adapted.named_parameters())


def planned(folder: Path, base_format: str) -> None:
    shape = base_model.read_config(ModelConfig(base=str(folder)))
    Rehearsal(shape, MethodConfig(name="lora", base=base_format), reference=str(folder))


def write_config(folder: Path, quantization: dict[str, object]) -> None:
    """Say in the folder's configuration how its weights are stored."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, tiny_base, tmp_path) -> tuple[str, Path]:
    load(tiny_base, request.param).save_pretrained(tmp_path)
    return request.param, tmp_path


def test_a_folder_of_one_of_our_formats_is_loaded_as_it_is(quantised, tiny_base):
    stored, folder = quantised
    planned(folder, stored)
    kind = {"nf4": Linear4bit, "int8": Linear8bitLt}[stored]
    layers = [module for module in load(folder, stored).modules() if isinstance(module, kind)]
    same = [module for module in load(tiny_base, stored).modules() if isinstance(module, kind)]
    assert len(layers) == 14
    for layer, other in zip(layers, same, strict=True):
        assert torch.equal(layer.weight.data.view(torch.uint8), other.weight.data.view(torch.uint8))


def test_under_another_name_it_is_refused_with_its_own(quantised):
    stored, folder = quantised
    for base_format in {"bf16", "nf4", "int8"} - {stored}:
        message = rf"method\.base {base_format}: .* are quantised already, as {stored}: set method\.base={stored}, or"
        for attempt in (planned, load):
            with pytest.raises(ConfigError, match=message):
                attempt(folder, base_format)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "as fp4: name the unq"),
        ({"quant_method": "gptq", "bits": 4}, "as gptq: name the unquantised model"),
        ({"quant_method": "mxfp4"}, "as mxfp4: set method.base=bf16, or name"),
    ],
)
def test_a_format_that_is_not_ours_is_refused_by_the_plan(stored, message, tiny_base, tmp_path):
    shutil.copy(tiny_base / "config.json", tmp_path)
    write_config(tmp_path, stored)
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, "nf4")


def test_mxfp4_is_widened_to_bfloat16(tmp_path):
    zoo.build("gpt-oss", tmp_path)
    rng, expected = np.random.default_rng(0), {}
    with rewritten(tmp_path) as tensors:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
            scales = rng.integers(122, 128, (experts, outputs, inputs // 32), dtype=np.uint8)
            tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
            # Two values a byte, the lower half first; 32 values share the exponent s of a scale 2^(s - 127).
            values = E2M1[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(experts, outputs, inputs // 32, 32)
            dense = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
            expected[name] = dense.reshape(experts, outputs, inputs).transpose(0, 2, 1)
    write_config(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    planned(tmp_path, "bf16")
    found = dict(load(tmp_path, "bf16").named_parameters())
    assert len(expected) == 4
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(found[name].float().numpy(), weight)


def test_fp8_is_widened_to_bfloat16(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path, dirs_exist_ok=True)
    rng, expected = np.random.default_rng(0), {}
    with rewritten(tmp_path) as tensors:
        for name in [name for name in tensors if "_proj" in name]:
            weight = torch.from_numpy(rng.normal(size=tensors[name].shape).astype(np.float32)).to(torch.float8_e4m3fn)
            rows, columns = weight.shape
            scales = np.exp2(rng.integers(-4, 1, (rows // 32, columns // 32))).astype(np.float32)
            tensors |= {name: weight, f"{name}_scale_inv": torch.from_numpy(scales)}
            expected[name] = weight.float().numpy() * scales.repeat(32, axis=0).repeat(32, axis=1)
    write_config(tmp_path, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"})
    planned(tmp_path, "bf16")
    found = dict(load(tmp_path, "bf16").named_parameters())
    assert len(expected) == 14
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name].float().numpy(), weight, rtol=2**-8)


BY_BITSANDBYTES = """
import itertools, torch, bitsandbytes
from ray_jobs.base import four_bits

theirs, ours = torch.ops.bitsandbytes.quantize_4bit.default, four_bits.quantize_4bit
draw = torch.Generator().manual_seed(0)
shapes = [(64,), (65,), (7, 9), (300, 1000), (64, 4096)]  # whole blocks and short ones, odd numbers, several pieces
for shape, dtype, kind, size, storage in itertools.product(
    shapes, (torch.bfloat16, torch.float16, torch.float32), ("nf4", "fp4"), (64, 4096), (torch.uint8, torch.bfloat16)
):
    weight = (0.05 * torch.randn(shape, generator=draw)).to(dtype)
    weight.view(-1)[:32] = 0
    weight.view(-1)[32:40] = 1e-40
    outcome = []
    for quantize in (theirs, ours):
        try:
            packed, largest = quantize(weight, size, kind, storage)
            kinds = packed.shape, packed.dtype, largest.dtype
            outcome.append((kinds, packed.view(torch.uint8).numpy().tobytes(), largest.numpy().tobytes()))
        except RuntimeError as exc:  # an odd number of bytes is no bfloat16
            outcome.append(str(exc))
    assert outcome[0] == outcome[1], (shape, dtype, kind, size, storage)
four_bits.register()
four_bits.register()
weight = torch.nn.Parameter(0.05 * torch.randn(128, 128))
assert torch.equal(theirs(weight, 64, "nf4", torch.uint8)[0], ours(weight.data, 64, "nf4", torch.uint8)[0])
print("done")
"""


@pytest.mark.slow
def test_it_finds_what_bitsandbytes_own_finds_to_the_bit():
    """In a process of its own: once there is a kernel for processors, theirs cannot be called any more."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BY_BITSANDBYTES], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stderr


def test_each_weight_becomes_the_nearest_number_times_the_largest_of_its_64():
    weight = torch.randn(40, 4096, generator=torch.Generator().manual_seed(1))
    packed, largest = four_bits.quantize_4bit(weight, 64, "nf4", torch.uint8)
    blocks = weight.numpy().astype(np.float64).reshape(-1, 64)
    np.testing.assert_array_equal(largest.numpy(), np.abs(blocks).max(axis=1))
    code = get_4bit_type("nf4", device="cpu").numpy().astype(np.float64)
    nearest = np.abs((blocks / np.abs(blocks).max(axis=1, keepdims=True))[..., None] - code).argmin(axis=-1).reshape(-1)
    found = np.stack([packed.numpy().reshape(-1) >> 4, packed.numpy().reshape(-1) & 15], axis=1).reshape(-1)
    # In float32 as in float64, but for what lies within a rounding of the middle between two numbers.
    assert (found != nearest).mean() < 1e-6


def test_a_weight_is_not_dequantised_with_statistics_on_another_device():
    packed, state = functional.quantize_4bit(torch.randn(16, 64).bfloat16(), quant_type="nf4")
    state.to("meta")
    with pytest.raises(JobError, match=r"shape \(16, 64\) is on cpu and its statistics are on meta"):
        four_bits.dequantize_4bit(packed, state)
