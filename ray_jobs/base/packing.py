"""Where the records of a packed row lie, and which of its tokens attend to which.

Shapes: see `ray_jobs.text.answer_loss`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Packing:
    """The layout of a packed row: a common prefix, then the rest of each record."""

    common: int
    """C: tokens of the common prefix, 0 where there is none."""
    rests: tuple[int, ...]
    """Tokens of each record after the common prefix, 1 or more."""
    read: Tensor | None = field(default=None, compare=False)
    """Indices of the tokens whose last hidden states are read, int64 (A,) on the CPU; None where it may be all."""
    device: torch.device = CPU
    """Device of the index tables below."""

    def on(self, device: torch.device) -> "Packing":
        """The same packing with its tables on `device`, created once for all layers."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = replace(self, device=device)
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, "Packing"]:
        return {}

    @property
    def longest(self) -> int:
        return max(self.rests)

    @cached_property
    def places(self) -> Tensor:
        """Index of each token after the common prefix among the N x S tokens of the padded rests, int64 (T - C,)."""
        starts = [record * self.longest for record in range(len(self.rests))]
        ranges = [torch.arange(start, start + rest) for start, rest in zip(starts, self.rests, strict=True)]
        return torch.cat(ranges).to(self.device)

    @cached_property
    def bias(self) -> Tensor:
        """Additive attention mask between the S tokens of a padded rest and the C + S tokens of their record: 0 where a
        token attends, minus infinity for later tokens. float32 (1, 1, S, C + S)."""
        unseen = torch.full((self.longest, self.common + self.longest), -torch.inf, device=self.device)
        return unseen.triu(diagonal=self.common + 1)[None, None]

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token within its record: int64 (1, T)."""
        rests = [torch.arange(self.common, self.common + rest) for rest in self.rests]
        return torch.cat([torch.arange(self.common), *rests])[None].to(self.device)

    def mask(self) -> Tensor:
        """A mask of the row that takes no memory and shows nothing, so that transformers builds none of T x T; see
        `is_placeholder`. bool (1, 1, T, T)."""
        num_tokens = self.common + sum(self.rests)
        return torch.zeros(1, dtype=torch.bool, device=self.device).expand(1, 1, num_tokens, num_tokens)

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """The row as flash attention takes sequences, which are the common prefix and each record's rest: where their
        queries and their keys (see `repeated`) begin and end, int32, and the most queries and keys of one."""
        queries, keys = [*self.rests], [self.common + rest for rest in self.rests]
        if self.common:
            queries, keys = [self.common, *queries], [self.common, *keys]
        ends = (torch.tensor([0, *lengths]).cumsum(0).int().to(self.device) for lengths in (queries, keys))
        return *ends, max(queries), max(keys)

    @cached_property
    def _order(self) -> Tensor:
        """Index of each key among N + 1 copies of the common prefix, followed by all rests: int64."""
        copies = torch.arange((len(self.rests) + 1) * self.common).split(self.common)
        rests = torch.arange(len(copies) * self.common, len(copies) * self.common + sum(self.rests)).split(self.rests)
        return torch.cat([copies[0], *chain.from_iterable(zip(copies[1:], rests, strict=True))]).to(self.device)

    def repeated(self, row_1XTD: Tensor) -> Tensor:
        """Keys or values (1, X, T, D) of each sequence: of the common prefix, and then of each whole record. The
        gradients of the copies are summed at once."""
        if not self.common:
            return row_1XTD
        copies = row_1XTD[0, :, None, : self.common].expand(-1, len(self.rests) + 1, -1, -1).flatten(1, 2)
        return torch.cat([copies, row_1XTD[0, :, self.common :]], dim=1)[:, self._order][None]

    def apart(self, row_TXD: Tensor) -> tuple[Tensor, Tensor]:
        """Split a row (T, X, D) into the common prefix, (1, X, C, D), and each record's rest, (N, X, S, D), padded with
        zeros on the right."""
        rest = row_TXD.new_zeros(len(self.rests) * self.longest, *row_TXD.shape[1:])
        rest[self.places] = row_TXD[self.common :]
        rest_NSXD = rest.view(len(self.rests), self.longest, *row_TXD.shape[1:])
        return row_TXD[None, : self.common].transpose(1, 2), rest_NSXD.transpose(1, 2)

    def together(self, common_1XCD: Tensor, rest_NXSD: Tensor) -> Tensor:
        """The inverse of `apart`: (T, X, D)."""
        rest = rest_NXSD.transpose(1, 2).flatten(0, 1)[self.places]
        return torch.cat([common_1XCD[0].transpose(0, 1), rest])

    def behind(self, common_1XCD: Tensor, rest_NXSD: Tensor) -> Tensor:
        """Keys or values of each whole record, the common prefix followed by its rest: (N, X, C + S, D)."""
        return torch.cat([common_1XCD.expand(len(rest_NXSD), -1, -1, -1), rest_NXSD], dim=2)


def is_placeholder(mask: Tensor | None) -> bool:
    """Whether this is a packed row's `mask`, which needs a kernel that is told of the packing."""
    return mask is not None and mask.shape[-1] > 1 and not any(mask.stride())
