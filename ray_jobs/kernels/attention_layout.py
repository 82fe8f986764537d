"""How attention's vectors are laid out: as rows of tokens with their heads together, or in parts by the keys they meet.

A part is one batch of products. Records in rows of their own are one part. Packed records are two: the rests are one
part, the common prefix is the other. Parts are stored flat, one vector of D after another: of each part all queries,
then all keys, then all values.

Shapes: N records of S tokens, X heads of D: K of queries, then G of keys and G of values; R = K / G queries of a token
attend to the same keys. Packed (see `base.packed`): T tokens of the row, C of the common prefix, S of the longest
rest. L tokens are attended to, C + S.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ray_jobs.base.packing import Packing

Shape = tuple[int, int, int]
"""Of a part the batch, the tokens whose queries it has, and the tokens that those look at."""


@dataclass(frozen=True)
class Heads:
    """How many there are, and what their scores are multiplied by."""

    queries: int
    keys: int
    scaling: float

    @property
    def per_key(self) -> int:
        """R."""
        return self.queries // self.keys


@dataclass(frozen=True)
class Rows:
    """Records in rows of their own."""

    heads: Heads
    num_records: int
    num_tokens: int

    @property
    def shapes(self) -> list[Shape]:
        """Of its one part."""
        return [(self.num_records * self.heads.keys, self.num_tokens, self.num_tokens)]

    def apart(self, qkv_NSXD: Tensor) -> Tensor:
        """What parts are made of."""
        flat = qkv_NSXD.new_empty(qkv_NSXD[..., 0].numel(), qkv_NSXD.shape[-1])
        for of_row, of_part in self._pairs(qkv_NSXD, flat):
            of_part.copy_(of_row)
        return flat

    def queries(self, x_NSKD: Tensor) -> Tensor:
        """The same of what has the queries alone."""
        return self._by_keys(x_NSKD).reshape(-1, x_NSKD.shape[-1])

    def together(self, flat: Tensor) -> Tensor:
        """The inverse of `queries`."""
        by_keys = flat.view(self.num_records, self.heads.keys, self.num_tokens, self.heads.per_key, -1)
        return by_keys.transpose(1, 2).reshape(self.num_records, self.num_tokens, self.heads.queries, -1)

    def gradients(self, flat: Tensor) -> Tensor:
        """The inverse of `apart`."""
        heads = self.heads.queries + 2 * self.heads.keys
        found = flat.new_empty(self.num_records, self.num_tokens, heads, flat.shape[-1])
        for of_row, of_part in self._pairs(found, flat):
            of_row.copy_(of_part)
        return found

    def _by_keys(self, x_NSKD: Tensor) -> Tensor:
        """(N, G, S, R, D)."""
        return x_NSKD.unflatten(2, (self.heads.keys, self.heads.per_key)).transpose(1, 2)

    def _pairs(self, qkv_NSXD: Tensor, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        K = self.heads.queries
        of_rows = [self._by_keys(qkv_NSXD[:, :, :K]), qkv_NSXD[:, :, K:].unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)]
        of_parts = flat.split([each[..., 0].numel() for each in of_rows])
        return [(row, part.view(row.shape)) for row, part in zip(of_rows, of_parts, strict=True)]


@dataclass(frozen=True)
class Packed:
    """A packed row. All is moved in one reading, by tables; behind a shorter record stands its last token again."""

    heads: Heads
    shapes: list[Shape]
    """Of the records' rests and, where there is one, the common prefix."""
    common: int
    of_parts: Tensor
    """Where in a row of X what parts are made of comes from."""
    of_queries: Tensor
    """Where in a row of K their queries, or what they have found, come from."""
    behind: Tensor
    """Which of the queries are behind a record."""
    back: Tensor
    """The inverse of `queries`: (T, K)."""
    all_back: Tensor
    """The inverse of `apart`: (T, X)."""

    def apart(self, qkv_NSXD: Tensor) -> Tensor:
        """What parts are made of."""
        return qkv_NSXD.reshape(-1, qkv_NSXD.shape[-1]).index_select(0, self.of_parts)

    def queries(self, x_NSKD: Tensor) -> Tensor:
        """The same of what has the queries alone, which is zero behind a record."""
        return x_NSKD.reshape(-1, x_NSKD.shape[-1]).index_select(0, self.of_queries).index_fill_(0, self.behind, 0)

    def together(self, flat: Tensor) -> Tensor:
        """The inverse of `queries`."""
        return flat.index_select(0, self.back).view(1, -1, self.heads.queries, flat.shape[-1])

    def gradients(self, flat: Tensor) -> Tensor:
        """The gradient of `apart`: every record attended to the common prefix, which also has a gradient of its own."""
        K, G, C = self.heads.queries, self.heads.keys, self.common
        found = flat.index_select(0, self.all_back).view(1, -1, K + 2 * G, flat.shape[-1])
        batch, tokens, looked_at = self.shapes[0]
        of_keys = flat[batch * tokens * self.heads.per_key :][: 2 * batch * looked_at]
        of_common = of_keys.view(2, -1, G, looked_at, flat.shape[-1])[..., :C, :].sum(dim=1)
        found[0, :C, K:] += of_common.flatten(0, 1).transpose(0, 1)
        return found


@lru_cache(maxsize=2)
def packed(packing: Packing, heads: Heads) -> Packed:
    """The same in each layer."""
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


def of(qkv_NSXD: Tensor, heads: Heads, packing: Packing | None) -> Rows | Packed:
    """How such rows are taken apart."""
    return Rows(heads, *qkv_NSXD.shape[:2]) if packing is None else packed(packing, heads)
