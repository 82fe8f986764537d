"""Signatures of many texts on disk; nine bytes per text stay in memory."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.prepare.minhash import Minima, Numbers, Signatures, sorted_band
from components.prepare.shingles import Hashes, Marks

_AT_ONCE = 2**11
"""Texts to read in one batch: the kernel maps 64 KiB of the file around each one's numbers meanwhile."""


class Signed:
    """Signatures that were added a part at a time, and one hash of all of each text.

    The file of bands holds the parts one after the other, each with a row per band; the file of minima a row per text.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Create two files with this name in the folder."""
        self._bands, self._minima = folder / f"{name}.bands", folder / f"{name}.minima"
        for path in (self._bands, self._minima):
            path.write_bytes(b"")
        self._sizes: list[int] = []
        self._equals: list[Hashes] = []
        self._are_found: list[Marks] = []
        self._num_bands = self._num_whole = 0

    def add(self, signatures: Signatures, equals: Hashes) -> None:
        """Add the signatures and the hashes of some more texts."""
        for path, array in (
            (self._bands, signatures.bands),
            (self._minima, np.concatenate([signatures.whole, signatures.own], axis=1)),
        ):
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
        self._num_bands, self._num_whole = len(signatures.bands), signatures.whole.shape[1]
        self._sizes.append(len(equals))
        self._equals.append(equals)
        self._are_found.append(signatures.is_found)

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def equals(self) -> Hashes:
        """One hash per text, of all of it."""
        return np.concatenate([np.zeros(0, np.uint64), *self._equals])

    def in_band(self, band: int, kept: Marks) -> tuple[Minima, Numbers]:
        """The band's hashes of the texts marked in `kept`, as `sorted_band` returns them."""
        hashes, begin = np.empty(len(kept), np.uint32), 0
        with self._bands.open("rb") as file:
            for size in self._sizes:
                file.seek(hashes.itemsize * (begin * self._num_bands + band * size))
                file.readinto(hashes[begin : begin + size].data)
                begin += size
        return sorted_band(hashes, kept & np.concatenate([kept[:0], *self._are_found]))

    def minima_at(self, places: Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The same as `Signatures.minima_at`."""
        wanted, where = np.unique(places, return_inverse=True)
        parts = []
        for start in range(0, max(1, len(wanted)), _AT_ONCE):
            # Opened anew for each batch, so that no mapped page stays in memory.
            mapped = np.memmap(self._minima, np.uint8, "r").reshape(len(self), -1)
            parts.append(np.asarray(mapped[wanted[start : start + _AT_ONCE]]))
        found = np.concatenate(parts)[where]
        return found[:, : self._num_whole], found[:, self._num_whole :]
