"""Where the records of a packed row lie, and which of its tokens attend to which.

Shapes: see `ray_jobs.text.answer_loss`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

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
        """Attention mask of the whole row, True where a token attends, for kernels that do not handle records:
        bool (1, 1, T, T)."""
        record = torch.repeat_interleave(torch.arange(len(self.rests)), torch.tensor(self.rests)) + 1
        record = torch.cat([torch.zeros(self.common, dtype=torch.long), record]).to(self.device)
        related = (record[:, None] == record) | (record == 0)
        return related.tril()[None, None]

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
