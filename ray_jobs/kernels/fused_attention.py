"""Attention forward and backward for the fused layer: of records in rows, or packed into one row.

PyTorch's kernel computes each head of each record separately: for short records these are products of 30 by 40 numbers,
which take longer to launch than to compute. Here the query heads that share keys are rows of one product, and all
records are computed at once; for long records, as many queries at a time as have scores that fit the caches. Everything
is in float32. Queries, keys and values are saved for the backward pass, and so are the attention weights where they
take no more memory than the output; otherwise they are recomputed.

Shapes: see `attention_layout`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_jobs.base.packing import Packing
from ray_jobs.kernels import attention_layout, float32_products
from ray_jobs.kernels.attention_layout import Heads, Shape

LONG = 512
"""Length in tokens from which the backward pass may round operands to bfloat16, as the products around it do: attention
is a third of a step by then, and transformers rounds in both passes."""
BLOCK = 2**20
"""Number of scores that a thread computes at a time: 4 MiB, about its cache."""
TOKENS = 64
"""Number of tokens whose queries are computed at a time in blocks: fewer means fewer masked scores."""

Block = tuple[slice, slice]
ALL: Block = (slice(None), slice(None))

softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Part:
    """Queries of some tokens, and the keys and values that they attend to: all before, and last the tokens' own.

    R is the number of query heads per key head.
    """

    q: Tensor
    """Queries (batch, tokens R, D); the R queries of a token follow each other."""
    k: Tensor
    """Keys (batch, tokens attended to, D)."""
    v: Tensor
    per_key: int
    """R, the number of query heads per key head."""

    def attend(self, attended: Tensor, *, keeps: bool) -> list[Tensor]:
        """Write softmax(q k^T) v into `attended`; returns the attention weights if `keeps`, else an empty list."""
        if keeps:
            weights = self._weights(ALL, ALL)
            torch.bmm(weights, self.v, out=attended)
            return [weights]
        for queries, keys in self._blocks():
            attended[queries] = torch.bmm(self._weights(queries, keys), self.v[keys])
        return []

    def back(self, gradient: Tensor, kept: Tensor | None, to: "Part") -> None:
        """Compute the gradients of q, k and v and write them into `to`."""
        if kept is not None:
            of_scores = self._of_scores(kept, gradient, ALL)
            torch.bmm(of_scores, self.k, out=to.q)
            torch.bmm(of_scores.transpose(1, 2), self.q, out=to.k)
            torch.bmm(kept.transpose(1, 2), gradient, out=to.v)
            return
        to.k.zero_()
        to.v.zero_()
        for queries, keys in self._blocks():
            weights, g = self._weights(queries, keys), gradient[queries]
            of_scores = self._of_scores(weights, g, keys)
            to.q[queries] = torch.bmm(of_scores, self.k[keys])
            to.k[keys] += torch.bmm(of_scores.transpose(1, 2), self.q[queries])
            to.v[keys] += torch.bmm(weights.transpose(1, 2), g)

    def _weights(self, queries: Block, keys: Block) -> Tensor:
        scores = torch.bmm(self.q[queries], self.k[keys].transpose(1, 2))
        tokens = scores.shape[1] // self.per_key
        scores[:, :, -tokens:] += _unseen(tokens, self.per_key)
        return torch.softmax(scores, dim=-1)

    def _of_scores(self, weights: Tensor, gradient: Tensor, keys: Block) -> Tensor:
        of_weights = torch.bmm(gradient, self.v[keys].transpose(1, 2))
        found: Tensor = softmax_backward(of_weights, weights, -1, weights.dtype)
        return found

    def _blocks(self) -> Iterator[tuple[Block, Block]]:
        """Slices of the queries that are computed at a time, and of the keys up to the last one that they attend to."""
        R, looked_at = self.per_key, self.k.shape[1]
        num_tokens = self.q.shape[1] // R
        tokens = min(num_tokens, TOKENS)
        batch = max(1, BLOCK * torch.get_num_threads() // (tokens * R * looked_at))
        for first in range(0, len(self.q), batch):
            of = slice(first, first + batch)
            for start in range(0, num_tokens, tokens):
                end = min(start + tokens, num_tokens)
                yield (of, slice(start * R, end * R)), (of, slice(0, looked_at - num_tokens + end))


def forward(qkv_NSXD: Tensor, heads: Heads, packing: Packing | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The attention output of each token, (N, S, K, D), and the tensors that `backward` needs. All are float32."""
    layout = attention_layout.of(qkv_NSXD, heads, packing)
    flat = layout.apart(qkv_NSXD)
    found = flat.new_empty(sum(batch * tokens for batch, tokens, _ in layout.shapes) * heads.per_key, flat.shape[-1])
    keeps = all(looked_at <= flat.shape[-1] for *_, looked_at in layout.shapes)
    weights: list[Tensor] = []
    with float32_products.by_onednn():
        for part, attended in zip(
            _parts(flat, layout.shapes, heads), _queries(found, layout.shapes, heads), strict=True
        ):
            part.q.mul_(heads.scaling)
            weights += part.attend(attended, keeps=keeps)
    return layout.together(found), (flat, *weights)


def backward(
    gradient_NSKD: Tensor, saved: tuple[Tensor, ...], heads: Heads, packing: Packing | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of queries, keys and values, in the input's layout; `dtype` is that of the surrounding products."""
    layout, (flat, *weights) = attention_layout.of(gradient_NSKD, heads, packing), saved
    found = torch.empty_like(flat)
    parts, to = _parts(flat, layout.shapes, heads), _parts(found, layout.shapes, heads)
    is_long = any(looked_at >= LONG for *_, looked_at in layout.shapes)
    with float32_products.by_onednn(may_round=is_long and dtype is torch.bfloat16):
        for number, gradient in enumerate(_queries(layout.queries(gradient_NSKD), layout.shapes, heads)):
            parts[number].back(gradient, weights[number] if weights else None, to[number])
            to[number].q.mul_(heads.scaling)
    return layout.gradients(found)


def _parts(flat: Tensor, shapes: list[Shape], heads: Heads) -> list[Part]:
    R = heads.per_key
    sizes = [batch * length for batch, tokens, looked_at in shapes for length in (tokens * R, looked_at, looked_at)]
    vectors = iter(flat.split(sizes))
    found = []
    for batch, *_ in shapes:
        q, k, v = (next(vectors).view(batch, -1, flat.shape[-1]) for _ in range(3))
        found.append(Part(q, k, v, R))
    return found


def _queries(flat: Tensor, shapes: list[Shape], heads: Heads) -> list[Tensor]:
    found = flat.split([batch * tokens * heads.per_key for batch, tokens, _ in shapes])
    return [each.view(batch, -1, each.shape[-1]) for each, (batch, *_) in zip(found, shapes, strict=True)]


def _unseen(num_tokens: int, per_key: int) -> Tensor:
    """The causal mask added to scores among the same tokens: minus infinity for later ones, (tokens R, tokens)."""
    later = torch.full((num_tokens, num_tokens), -torch.inf).triu(diagonal=1)
    return later.repeat_interleave(per_key, dim=0)
