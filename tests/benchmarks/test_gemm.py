"""That a step's operations are counted as published, and as PyTorch counts them."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import gemm

# HuggingFaceTB/SmolLM2-135M, config.json.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
    return str(tmp_path)


def test_the_layers_are_all_that_the_published_number_of_weights_leaves(base: str) -> None:
    """134,515,008 weights, by the metadata of its safetensors on the hub; one embedding, and norms of one vector."""
    linear = sum(count * outputs * inputs for (outputs, inputs), count in gemm.shapes(base).items())
    assert linear + 49152 * 576 + (2 * 30 + 1) * 576 == 134_515_008


def test_frozen_and_trained_weights_count_as_pytorch_counts_them(base: str) -> None:
    num_tokens, rank = 7, 16
    linear = [(shape, count) for shape, count in gemm.shapes(base).items()]
    counted = 0
    for (outputs, inputs), count in linear:
        x = torch.randn(num_tokens, inputs, requires_grad=True)
        weight = torch.randn(outputs, inputs)
        down, up = (torch.randn(size, requires_grad=True) for size in ((rank, inputs), (outputs, rank)))
        with FlopCounterMode(display=False) as counter:
            (x @ weight.T + x @ down.T @ up.T).sum().backward()
        counted += count * counter.get_total_flops()
    given = {"base": base, "rank": rank}
    assert gemm.step_flops(given, tokens=num_tokens, labelled=0, squares=0) == counted


def test_the_head_counts_where_there_is_a_label_and_attention_by_the_square(base: str) -> None:
    given = {"base": base, "rank": 0}
    assert gemm.step_flops(given, tokens=0, labelled=3, squares=0) == 3 * 4 * 49152 * 576
    # arXiv:2001.08361, table 1: 2 n_layer n_ctx d_attn a token forward; the backward pass takes twice that.
    assert gemm.step_flops(given, tokens=0, labelled=0, squares=10 * 10) == 3 * 10 * (2 * 30 * 10 * 576)
