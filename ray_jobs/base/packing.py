"""Where the records of a packed row are, and which of its tokens attend to which."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Packing:
    """Where a row's records lie."""

    common: int
    rests: tuple[int, ...]
    """Tokens of each record after the common prefix, 1 or more."""
    read: Tensor | None = field(default=None, compare=False)
    """Tokens whose last hidden states are read, int64 (A,) on the CPU; None where that may be all."""
    device: torch.device = CPU
    """Where its tables are."""

    def on(self, device: torch.device) -> "Packing":
        """The same with its tables there, made once for all layers."""
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
        """S."""
        return max(self.rests)

    @cached_property
    def places(self) -> Tensor:
        """Of each token after the common prefix, its place among N x S padded ones."""
        starts = [record * self.longest for record in range(len(self.rests))]
        ranges = [torch.arange(start, start + rest) for start, rest in zip(starts, self.rests, strict=True)]
        return torch.cat(ranges).to(self.device)

    @cached_property
    def bias(self) -> Tensor:
        """What is added to the scores of a padded rest's tokens with the C + S of their record: 0 for what a token
        looks at, minus infinity for what comes after it. float32 (1, 1, S, C + S)."""
        unseen = torch.full((self.longest, self.common + self.longest), -torch.inf, device=self.device)
        return unseen.triu(diagonal=self.common + 1)[None, None]

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its record: int64 (1, T)."""
        rests = [torch.arange(self.common, self.common + rest) for rest in self.rests]
        return torch.cat([torch.arange(self.common), *rests])[None].to(self.device)

    def mask(self) -> Tensor:
        """Which token of the row attends to which, for a kernel that does not know of records: bool (1, 1, T, T)."""
        record = torch.repeat_interleave(torch.arange(len(self.rests)), torch.tensor(self.rests)) + 1
        record = torch.cat([torch.zeros(self.common, dtype=torch.long), record]).to(self.device)
        related = (record[:, None] == record) | (record == 0)
        return related.tril()[None, None]

    def apart(self, row_TXD: Tensor) -> tuple[Tensor, Tensor]:
        """Heads of the common prefix's tokens, (1, X, C, D), and of each record's rest, (N, X, S, D), with zeros
        behind it."""
        rest = row_TXD.new_zeros(len(self.rests) * self.longest, *row_TXD.shape[1:])
        rest[self.places] = row_TXD[self.common :]
        rest_NSXD = rest.view(len(self.rests), self.longest, *row_TXD.shape[1:])
        return row_TXD[None, : self.common].transpose(1, 2), rest_NSXD.transpose(1, 2)

    def together(self, common_1XCD: Tensor, rest_NXSD: Tensor) -> Tensor:
        """The inverse of `apart`: (T, X, D)."""
        rest = rest_NXSD.transpose(1, 2).flatten(0, 1)[self.places]
        return torch.cat([common_1XCD[0].transpose(0, 1), rest])

    def behind(self, common_1XCD: Tensor, rest_NXSD: Tensor) -> Tensor:
        """Keys or values of each record, (N, X, C + S, D)."""
        return torch.cat([common_1XCD.expand(len(rest_NXSD), -1, -1, -1), rest_NXSD], dim=2)
