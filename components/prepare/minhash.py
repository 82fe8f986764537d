"""MinHash with banding (LSH): find the pairs of similar sets of hashes without comparing all pairs; pure.

Broder (1997); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.

Each text has two sets, the shingles of the whole text and those of its own part (see `near_duplicates`). Two texts are
similar if both are. So each band holds minima of both sets, and a pair with only one of them similar seldom shares a
band.

The minima come from one permutation (Li, Owen and Zhang, 2012, arXiv:1208.1259): the hashes of a set are divided into
as many bins as there are minima, and each bin gives its smallest. An empty bin copies the minimum of a bin that is not
empty, the first in an order that depends on the empty bin alone (optimal densification: Shrivastava, 2017,
arXiv:1703.04664). So the share of equal minima is an unbiased estimate of the similarity.

Of pairs exactly at the threshold (0.5, 0.8, 0.9), a few in ten thousand are missed if the larger set has ten hashes or
more. With two to four hashes in it, three in a hundred are missed at 0.5.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from components.prepare.shingles import BASE, Hashes, Marks, Rows, mixed

MISSED = 1e-4
"""Probability that no band finds a pair exactly at the threshold, if the minima were independent. Pairs of more
similarity are missed less often."""
SELECTIVITY = 0.3
"""Approximate probability that one band finds such a pair. It decides how many minima a band holds."""
FEWEST_MINIMA, MOST_MINIMA, MOST_BANDS = 2, 8, 256
DEVIATIONS = 5
"""How many standard deviations, of independent minima, an estimate may lie below the threshold. Copied minima increase
the deviation, by at most an eighth, for texts of about twenty shingles."""

EMPTY = np.uint32(2**32 - 1)
"""The minimum of an empty set."""
FEW = 16
"""If fewer than one bin in this number is still empty, the empty ones are filled one by one, else all at once."""
ROUNDING = 1e-6
PAIRS_AT_ONCE = 2**16

Numbers = npt.NDArray[np.int64]
Minima = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Signatures:
    """The signatures of some texts: the hash of each band, and one byte of each minimum, to estimate similarity."""

    bands: Minima
    """One row per band, one column per text."""
    whole: npt.NDArray[np.uint8]
    """One row per text, as in `own`."""
    own: npt.NDArray[np.uint8]
    is_found: Marks
    """False for a text without an own part, which no band proposes."""

    @classmethod
    def joined(cls, parts: Iterable["Signatures"], *, texts: int) -> "Signatures":
        """Join the parts, which hold `texts` texts (at least one) together, in order. No part is kept in memory."""
        arrays: list[npt.NDArray[Any]] = []
        filled = 0
        for part in parts:
            given: list[npt.NDArray[Any]] = [part.bands.T, part.whole, part.own, part.is_found]
            if not arrays:
                arrays = [np.empty((texts, *each.shape[1:]), each.dtype) for each in given[1:]]
                arrays.insert(0, np.empty((len(part.bands), texts), np.uint32).T)
            for array, each in zip(arrays, given, strict=True):
                array[filled : filled + len(each)] = each
            filled += len(part.is_found)
        return cls(arrays[0].T, *arrays[1:])

    def minima_at(self, places: Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """One byte of each minimum, one row per text: of the whole texts, and of their own parts."""
        return self.whole[places], self.own[places]


class Minimal(Protocol):
    """The part of signatures that estimates need."""

    def minima_at(self, places: Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """As `Signatures.minima_at`."""


class Band:
    """An index of texts by their hash in one band."""

    def __init__(self, hashes: Minima, rows: Numbers) -> None:
        """`hashes` and `rows` as `sorted_band` returns them. The index takes nine or ten bytes per text."""
        self._hashes, self._rows = hashes, rows.astype(np.uint32)
        bits = min((4 * len(rows)).bit_length(), 32)
        self._shift = np.uint32(32 - bits)
        is_taken = np.zeros(max(8, 2**bits), bool)
        is_taken[hashes >> self._shift] = True
        self._taken = np.packbits(is_taken, bitorder="little")

    def with_hash(self, hashes: Minima, *, most: int) -> tuple[Numbers, Numbers]:
        """Pairs of an index into `hashes` and a text with that hash, at most `most` texts per index."""
        slots = hashes >> self._shift  # most hashes have no text: a table of one bit per slot rules them out first
        places = np.flatnonzero(self._taken[slots >> np.uint32(3)] >> (slots & np.uint32(7)) & np.uint32(1))
        begin = np.searchsorted(self._hashes, hashes[places])
        is_there = self._hashes[begin.clip(max=len(self._hashes) - 1)] == hashes[places]
        places, begin = places[is_there], begin[is_there]
        found = np.minimum(np.searchsorted(self._hashes, hashes[places], "right") - begin, most)
        offsets = np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
        return np.repeat(places, found), self._rows[np.repeat(begin, found) + offsets].astype(np.int64)


class MinHash:
    """Bands and minima that find pairs of this similarity; the same on every machine."""

    def __init__(self, similarity: float) -> None:
        minima = round(math.log(SELECTIVITY) / math.log(similarity)) if similarity < 1 else MOST_MINIMA
        minima = min(max(minima, FEWEST_MINIMA), MOST_MINIMA)
        is_found = similarity**minima
        number = math.ceil(math.log(MISSED) / math.log1p(-is_found)) if is_found < 1 else 1
        self.similarity = similarity
        self.bands = min(number, MOST_BANDS)
        self._whole, self._own = self.bands * (minima - minima // 2), self.bands * (minima // 2)

    def signatures(self, hashes: Hashes, rows: Rows, is_whole: Marks, is_own: Marks, *, texts: int) -> Signatures:
        """The signatures of a batch of `texts` texts. `hashes` have mixed bits; `rows`, `is_whole` and `is_own` give
        for each the text that it belongs to, and whether it counts in the whole text's set and in the own part's."""
        whole = minima_of(hashes, rows, is_whole, texts=texts, bins=self._whole)
        own = minima_of(hashes * np.uint64(BASE), rows, is_own, texts=texts, bins=self._own)
        of_a_band = np.concatenate([whole.reshape(self.bands, -1, texts), own.reshape(self.bands, -1, texts)], axis=1)
        is_found = own[0] != EMPTY
        return Signatures(_combined(of_a_band), whole.T.astype(np.uint8), own.T.astype(np.uint8), is_found)

    def likely(self, ours: Minimal, rows: Numbers, theirs: Minimal, others: Numbers) -> npt.NDArray[np.float32]:
        """Estimated similarity of each pair, the lower one of both sets, or -1 if it is surely below the threshold."""
        starts = range(0, len(rows), PAIRS_AT_ONCE)
        parts = [slice(start, start + PAIRS_AT_ONCE) for start in starts]
        found = [self._likely(ours, rows[part], theirs, others[part]) for part in parts]
        return np.concatenate([np.zeros(0, np.float32), *found])

    def _likely(self, ours: Minimal, rows: Numbers, theirs: Minimal, others: Numbers) -> npt.NDArray[np.float32]:
        estimates = []
        for one, other in zip(ours.minima_at(rows), theirs.minima_at(others), strict=True):
            agreeing = (one == other).mean(axis=1, dtype=np.float32)
            deviation = math.sqrt(self.similarity * (1 - self.similarity) / one.shape[1])
            estimates.append(np.where(agreeing >= self.similarity - DEVIATIONS * deviation - ROUNDING, agreeing, -1))
        return np.minimum(*estimates)


def sorted_band(hashes: Minima, marked: Marks) -> tuple[Minima, Numbers]:
    """The hashes of the marked texts, sorted, and the texts' indices. Equal hashes are in the order of the texts."""
    packed = np.flatnonzero(marked).view(np.uint64)
    upper = hashes[marked].astype(np.uint64)
    upper <<= np.uint64(32)  # in place, as there may be millions
    packed |= upper
    del upper
    packed.sort()
    keys = (packed >> np.uint64(32)).astype(np.uint32)
    packed &= np.uint64(2**32 - 1)
    return keys, packed.view(np.int64)


def minima_of(hashes: Hashes, rows: Rows, is_in: Marks, *, texts: int, bins: int) -> Minima:
    """The minima of each text, one row per bin and one column per text; `EMPTY` for a text without marked hashes.

    The upper half of a hash selects its bin, and the lower half is the number that is compared.
    """
    found = np.full((texts, bins), EMPTY, np.uint32)
    cells = rows * bins + ((hashes >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).view(np.int64)
    np.minimum.at(found.reshape(-1), cells, np.where(is_in, hashes.astype(np.uint32), EMPTY))
    return _densified(np.ascontiguousarray(found.T))


def _densified(sparse: Minima) -> Minima:
    """Fill each empty bin from another bin of the same text."""
    dense = sparse.copy()
    lenders = iter(lenders_of(len(sparse)))
    is_empty = (dense == EMPTY) & (dense.min(axis=0) != EMPTY)
    while np.count_nonzero(is_empty) > is_empty.size // FEW:
        dense &= sparse[next(lenders)] | (is_empty.astype(np.uint32) - np.uint32(1))  # EMPTY has every bit
        is_empty &= dense == EMPTY
    bins, texts = np.divmod(np.flatnonzero(is_empty), sparse.shape[1])
    while len(bins):
        dense[bins, texts] = lent = sparse[next(lenders)[bins], texts]
        is_still = lent == EMPTY
        bins, texts = bins[is_still], texts[is_still]
    return dense


@cache
def lenders_of(bins: int) -> Numbers:
    """One column per bin: all bins, in the order in which an empty bin tries them."""
    return np.argsort(mixed(np.arange(bins * bins, dtype=np.uint64) + np.uint64(BASE)).reshape(bins, bins), axis=0)


def _combined(minima: Minima) -> Minima:
    """Hash the numbers along the second axis into one."""
    factors = mixed(np.arange(1, minima.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (mixed((minima * factors[:, np.newaxis]).sum(axis=1)) >> np.uint64(32)).astype(np.uint32)
