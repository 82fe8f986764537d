"""Attention of the fused layer against PyTorch's, in float64 and of each record alone."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ray_jobs.base.packing import Packing
from ray_jobs.kernels import fused_attention
from ray_jobs.kernels.fused_attention import Heads

HEADS = Heads(queries=6, keys=2, scaling=0.3)
PACKINGS = {
    "a common beginning": Packing(common=5, rests=(4, 7, 1)),
    "a beginning longer than what follows": Packing(common=11, rests=(2, 3)),
    "nothing in common": Packing(common=0, rests=(6, 2)),
    "no packing": None,
}
WAYS = {"weights are kept": 32, "weights are computed again": 4}
"""By the width of a head."""
BLOCKS = {"all at once": {}, "a few queries at a time": {"TOKENS": 3, "BLOCK": 40}}


def rows(packing: Packing | None, width: int) -> torch.Tensor:
    """Queries, keys and values of a row, or of three records of nine tokens."""
    shape = (3, 9) if packing is None else (1, packing.common + sum(packing.rests))
    draw = torch.Generator().manual_seed(0)
    return torch.randn(*shape, HEADS.queries + 2 * HEADS.keys, width, generator=draw)


def alone(qkv: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """What PyTorch's own attention gives for each record by itself."""

    def attended(record_SXD: torch.Tensor) -> torch.Tensor:
        q, k, v = record_SXD.transpose(0, 1).split([HEADS.queries, HEADS.keys, HEADS.keys])
        options = {"is_causal": True, "scale": HEADS.scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0].transpose(0, 1)

    if packing is None:
        return torch.stack([attended(record) for record in qkv])
    C, row = packing.common, qkv[0]
    starts = torch.tensor([C, *packing.rests]).cumsum(0).tolist()
    records = [attended(torch.cat([row[:C], row[start:end]])) for start, end in pairwise(starts)]
    return torch.cat([records[0][:C], *(each[C:] for each in records)])[None]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PACKINGS)
def test_it_finds_and_gives_back_what_pytorch_does(name, way, blocks, monkeypatch):
    for constant, value in BLOCKS[blocks].items():
        monkeypatch.setattr(fused_attention, constant, value)
    packing = PACKINGS[name]
    qkv = rows(packing, WAYS[way])
    exact = qkv.double().requires_grad_()
    expected = alone(exact, packing)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(gradient.double())
    found, saved = fused_attention.forward(qkv, HEADS, packing)
    assert (len(saved) > 1) == (way == "weights are kept")
    back = fused_attention.backward(gradient, saved, HEADS, packing, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(back.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_no_more_is_kept_than_queries_keys_values_and_as_much_as_is_found():
    for num_tokens in (8, 9, 64, 512):
        qkv = torch.zeros(1, num_tokens, HEADS.queries + 2 * HEADS.keys, 8)
        found, saved = fused_attention.forward(qkv, HEADS, None)
        assert sum(each.numel() for each in saved) <= qkv.numel() + found.numel()


@pytest.mark.parametrize("spread", [1.0, 27.0], ids=["ordinary keys", "keys as large as Qwen2.5-7B's"])
def test_rounding_costs_long_records_no_more_than_pytorchs_own_bfloat16(spread):
    """Qwen2.5-7B: queries of standard deviation 3.5, keys of 26.8 by their biases (tenstorrent/tt-metal#21199)."""
    draw = torch.Generator().manual_seed(0)
    heads, num_tokens, width = Heads(queries=4, keys=1, scaling=1 / 8), fused_attention.LONG + 40, 64

    def drawn(*shape):
        return torch.randn(*shape, generator=draw)

    q = 3.5 * drawn(num_tokens, heads.queries, width)
    k = spread * drawn(heads.keys, width) + drawn(num_tokens, heads.keys, width)
    qkv = torch.cat([q, k, 0.3 * drawn(num_tokens, heads.keys, width)], dim=1)[None]
    gradient = drawn(1, num_tokens, heads.queries, width)

    def by_pytorch(dtype):
        given = qkv.to(dtype).requires_grad_()
        q, k, v = given[0].transpose(0, 1).split([heads.queries, heads.keys, heads.keys])
        found = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=heads.scaling, enable_gqa=True
        )
        found.backward(gradient.transpose(1, 2).to(dtype))
        return given.grad.double().split([heads.queries, heads.keys, heads.keys], dim=2)

    _, saved = fused_attention.forward(qkv.clone(), heads, None)
    found = fused_attention.backward(gradient, saved, heads, None, torch.bfloat16).double()
    exact, rounded = by_pytorch(torch.float64), by_pytorch(torch.bfloat16)
    for ours, theirs, right in zip(found.split([4, 1, 1], dim=2), rounded, exact, strict=True):
        assert (ours - right).norm() <= 1.1 * (theirs - right).norm()
