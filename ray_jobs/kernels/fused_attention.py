"""Attention forward and backward for the fused layer, in float32: of records in rows, or packed into one row.

PyTorch's kernel computes each head of each record separately, which for short records takes longer to launch than to
compute. Here the query heads that share keys are rows of one product, and all records are computed at once; of long
ones as many queries at a time as have scores that fit the caches. Attention weights are kept for the backward pass
where they take no more memory than the output, and else recomputed.

Shapes: see the layouts below.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ray_jobs.base.packing import Packing
from ray_jobs.kernels import float32_layers

# Two layouts of attention's vectors: as rows of tokens with all heads, or in parts, grouped by the keys attended to.
#
# A part is one batch of matrix products. Records in separate rows are one part. Packed records are two parts: the
# rests, and the common prefix. Parts are stored flat, one vector of D after another: for each part all queries, then
# all keys, then all values.
#
# Shapes: N records of S tokens, X heads of size D: K query heads, then G key heads and G value heads; R = K / G query
# heads share a key head. Packed (see `text.answer_loss`): T tokens of the row, C of the common prefix, S of the longest
# rest. L = C + S tokens are attended to.

Shape = tuple[int, int, int]
"""Shape of a part: batch size, number of tokens with queries, number of tokens that these attend to."""


@dataclass(frozen=True)
class Heads:
    """Numbers of query and key heads, and the factor that attention scores are multiplied by."""

    queries: int
    keys: int
    scaling: float

    @property
    def per_key(self) -> int:
        return self.queries // self.keys


@dataclass(frozen=True)
class Rows:
    """The layout of records in separate rows."""

    heads: Heads
    num_records: int
    num_tokens: int

    @property
    def shapes(self) -> list[Shape]:
        return [(self.num_records * self.heads.keys, self.num_tokens, self.num_tokens)]

    def apart(self, qkv_NSXD: Tensor) -> Tensor:
        """Rearrange queries, keys and values from rows into flat parts."""
        flat = qkv_NSXD.new_empty(qkv_NSXD[..., 0].numel(), qkv_NSXD.shape[-1])
        for of_row, of_part in self._pairs(qkv_NSXD, flat):
            of_part.copy_(of_row)
        return flat

    def queries(self, x_NSKD: Tensor) -> Tensor:
        """Rearrange a tensor that has only the query heads from rows into flat parts."""
        return self._by_keys(x_NSKD).reshape(-1, x_NSKD.shape[-1])

    def together(self, flat: Tensor) -> Tensor:
        """The inverse of `queries`."""
        by_keys = flat.view(self.num_records, self.heads.keys, self.num_tokens, self.heads.per_key, -1)
        return by_keys.transpose(1, 2).reshape(self.num_records, self.num_tokens, self.heads.queries, -1)

    def gradients(self, flat: Tensor) -> Tensor:
        """The inverse of `apart`."""
        heads = self.heads.queries + 2 * self.heads.keys
        result = flat.new_empty(self.num_records, self.num_tokens, heads, flat.shape[-1])
        for of_row, of_part in self._pairs(result, flat):
            of_row.copy_(of_part)
        return result

    def _by_keys(self, x_NSKD: Tensor) -> Tensor:
        """Query heads grouped by the key head that they share: (N, G, S, R, D)."""
        return x_NSKD.unflatten(2, (self.heads.keys, self.heads.per_key)).transpose(1, 2)

    def _pairs(self, qkv_NSXD: Tensor, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        K = self.heads.queries
        of_rows = [self._by_keys(qkv_NSXD[:, :, :K]), qkv_NSXD[:, :, K:].unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)]
        of_parts = flat.split([of_row[..., 0].numel() for of_row in of_rows])
        return [(row, part.view(row.shape)) for row, part in zip(of_rows, of_parts, strict=True)]


@dataclass(frozen=True)
class Packed:
    """The layout of a packed row. One gather with an index table moves all vectors; shorter rests are padded by
    repeating their last token."""

    heads: Heads
    shapes: list[Shape]
    """Shapes of the part of the rests and, where there is a common prefix, of its part."""
    common: int
    of_parts: Tensor
    """Index table of `apart`: for each vector of the parts, its place among the row's T x X vectors."""
    of_queries: Tensor
    """Index table of `queries`: for each query of the parts, its place among the row's T x K vectors."""
    behind: Tensor
    """Indices of the queries that are padding behind a shorter rest."""
    back: Tensor
    """Index table of the inverse of `queries`, flattened from (T, K)."""
    all_back: Tensor
    """Index table of the inverse of `apart`, flattened from (T, X)."""

    def apart(self, qkv_NSXD: Tensor) -> Tensor:
        """Rearrange queries, keys and values from the row into flat parts."""
        return qkv_NSXD.reshape(-1, qkv_NSXD.shape[-1]).index_select(0, self.of_parts)

    def queries(self, x_NSKD: Tensor) -> Tensor:
        """Rearrange a tensor that has only the query heads into flat parts, with zeros in the padding."""
        return x_NSKD.reshape(-1, x_NSKD.shape[-1]).index_select(0, self.of_queries).index_fill_(0, self.behind, 0)

    def together(self, flat: Tensor) -> Tensor:
        """The inverse of `queries`."""
        return flat.index_select(0, self.back).view(1, -1, self.heads.queries, flat.shape[-1])

    def gradients(self, flat: Tensor) -> Tensor:
        """The gradient of `apart`. The common prefix receives the gradients of its own part, plus the sum of those of
        all records, which attended to its keys and values."""
        K, G, C = self.heads.queries, self.heads.keys, self.common
        result = flat.index_select(0, self.all_back).view(1, -1, K + 2 * G, flat.shape[-1])
        batch, tokens, looked_at = self.shapes[0]
        of_keys = flat[batch * tokens * self.heads.per_key :][: 2 * batch * looked_at]
        of_common = of_keys.view(2, -1, G, looked_at, flat.shape[-1])[..., :C, :].sum(dim=1)
        result[0, :C, K:] += of_common.flatten(0, 1).transpose(0, 1)
        return result


@lru_cache(maxsize=2)
def packed(packing: Packing, heads: Heads) -> Packed:
    """Build the layout of a packed row; it is cached, as all layers use the same one."""
    N, S, C, K, G, R = len(packing.rests), packing.longest, packing.common, heads.queries, heads.keys, heads.per_key
    L, X = C + S, K + 2 * G
    rests = torch.tensor(packing.rests)[:, None]
    beginning, head, key = torch.arange(C), torch.arange(K), torch.arange(G)
    rest = C + rests.cumsum(0) - rests + torch.minimum(torch.arange(S), rests - 1)
    seen = torch.cat([beginning.expand(N, C), rest], dim=1)

    def queries(tokens: Tensor, width: int) -> Tensor:
        return (width * tokens[:, None, :, None] + head.view(G, 1, R)).flatten()

    def part(tokens: Tensor, looked_at: Tensor) -> list[Tensor]:
        keys = (X * looked_at[:, None] + K + key[:, None]).flatten()
        return [queries(tokens, X), keys, keys + G]

    def back(record: Tensor, place: Tensor, batch: int, tokens: int, looked_at: int) -> list[Tensor]:
        row, before = (record * G + head // R) * tokens + place, looked_at - tokens
        keys = batch * tokens * R + (record * G + key) * looked_at + before + place
        return [row * R + head % R, keys, keys + batch * looked_at]

    of_rest, of_beginning = part(rest, seen), part(beginning[None], beginning[None])
    num_queries, num_vectors = len(of_rest[0]), sum(map(len, of_rest))
    shapes = [(N * G, S, L), (G, C, C)]
    rest_back = back((packing.places // S)[:, None], (packing.places % S)[:, None], *shapes[0])
    beginning_back = back(torch.zeros(C, 1, dtype=torch.long), beginning[:, None], *shapes[1])
    return Packed(
        heads=heads,
        shapes=shapes if C else shapes[:1],
        common=C,
        of_parts=torch.cat([*of_rest, *of_beginning]),
        of_queries=torch.cat([queries(rest, K), queries(beginning[None], K)]),
        behind=(torch.arange(S) >= rests)[:, None, :, None].expand(N, G, S, R).flatten().nonzero()[:, 0],
        back=torch.cat([num_queries + beginning_back[0], rest_back[0]]).flatten(),
        all_back=torch.cat([num_vectors + torch.cat(beginning_back, dim=1), torch.cat(rest_back, dim=1)]).flatten(),
    )


def layout_of(qkv_NSXD: Tensor, heads: Heads, packing: Packing | None) -> Rows | Packed:
    """The layout for such rows: `Packed` with a packing, else `Rows`."""
    return Rows(heads, *qkv_NSXD.shape[:2]) if packing is None else packed(packing, heads)


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
        later = torch.full((tokens, tokens), -torch.inf).triu(diagonal=1)
        scores[:, :, -tokens:] += later.repeat_interleave(self.per_key, dim=0)
        return torch.softmax(scores, dim=-1)

    def _of_scores(self, weights: Tensor, gradient: Tensor, keys: Block) -> Tensor:
        of_weights = torch.bmm(gradient, self.v[keys].transpose(1, 2))
        result: Tensor = softmax_backward(of_weights, weights, -1, weights.dtype)
        return result

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
    layout = layout_of(qkv_NSXD, heads, packing)
    flat = layout.apart(qkv_NSXD)
    result = flat.new_empty(sum(batch * tokens for batch, tokens, _ in layout.shapes) * heads.per_key, flat.shape[-1])
    keeps = all(looked_at <= flat.shape[-1] for *_, looked_at in layout.shapes)
    weights: list[Tensor] = []
    with float32_layers.by_onednn():
        for part, attended in zip(
            _parts(flat, layout.shapes, heads), _queries(result, layout.shapes, heads), strict=True
        ):
            part.q.mul_(heads.scaling)
            weights += part.attend(attended, keeps=keeps)
    return layout.together(result), (flat, *weights)


def backward(
    gradient_NSKD: Tensor, saved: tuple[Tensor, ...], heads: Heads, packing: Packing | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of queries, keys and values, in the input's layout; `dtype` is that of the surrounding products."""
    layout, (flat, *weights) = layout_of(gradient_NSKD, heads, packing), saved
    result = torch.empty_like(flat)
    parts, to = _parts(flat, layout.shapes, heads), _parts(result, layout.shapes, heads)
    is_long = any(looked_at >= LONG for *_, looked_at in layout.shapes)
    with float32_layers.by_onednn(may_round=is_long and dtype is torch.bfloat16):
        for number, gradient in enumerate(_queries(layout.queries(gradient_NSKD), layout.shapes, heads)):
            parts[number].back(gradient, weights[number] if weights else None, to[number])
            to[number].q.mul_(heads.scaling)
    return layout.gradients(result)


def _parts(flat: Tensor, shapes: list[Shape], heads: Heads) -> list[Part]:
    R = heads.per_key
    sizes = [batch * length for batch, tokens, looked_at in shapes for length in (tokens * R, looked_at, looked_at)]
    vectors = iter(flat.split(sizes))
    parts = []
    for batch, *_ in shapes:
        q, k, v = (next(vectors).view(batch, -1, flat.shape[-1]) for _ in range(3))
        parts.append(Part(q, k, v, R))
    return parts


def _queries(flat: Tensor, shapes: list[Shape], heads: Heads) -> list[Tensor]:
    pieces = flat.split([batch * tokens * heads.per_key for batch, tokens, _ in shapes])
    return [piece.view(batch, -1, piece.shape[-1]) for piece, (batch, *_) in zip(pieces, shapes, strict=True)]
