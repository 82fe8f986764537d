"""MinHash: of two sets of hashes a few numbers each, by which similar pairs are found without looking at all; pure.

Of a text there are two sets, what it says in whole and what of that it says of its own, and two texts are similar when
both are. So each band holds minima of both, and a pair that only one of them makes similar seldom shares a band.
Broder (1997); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.

A set's hashes are divided into as many bins as there are minima, and the smallest of each bin is one: one permutation
for all of them (Li, Owen and Zhang, 2012, arXiv:1208.1259). A bin without any takes the minimum of another that has
some, of those the first in an order of its own, so that the minima of two sets agree as often as the sets are similar
(Shrivastava, 2017, arXiv:1703.04664). Of pairs that are just as similar as asked, by 0.5, 0.8 or 0.9, one in some
thousands is missed where the larger set has ten hashes or more; of two or four hashes one may find its bin taken, and
at 0.5 three in a hundred such pairs are missed.
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
"""Probability, of independent minima, that no band finds a pair of exactly the similarity asked for; one of more
similarity is missed less."""
SELECTIVITY = 0.3
"""Probability, about, that one band finds such a pair: it decides how many minima a band holds."""
FEWEST_MINIMA, MOST_MINIMA, MOST_BANDS = 2, 8, 256
DEVIATIONS = 5
"""By how many standard deviations of so many independent minima an estimate may lie below the similarity asked for.
What bins borrow makes it vary more, by an eighth at most, among texts of about twenty shingles."""

EMPTY = np.uint32(2**32 - 1)
"""What stands for the minimum of no hashes."""
FEW = 16
"""Bins are asked for one by one where less than one in so many is still empty, and else all at once."""
ROUNDING = 1e-6
PAIRS_AT_ONCE = 2**16

Numbers = npt.NDArray[np.int64]
Minima = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Signatures:
    """Of some texts: the bands' hashes, and of each minimum a byte, which similarity is estimated by."""

    bands: Minima
    """A row a band, a column a text."""
    whole: npt.NDArray[np.uint8]
    """A row a text, as `own`."""
    own: npt.NDArray[np.uint8]
    is_found: Marks
    """False for a text that says nothing of its own: no band finds it."""

    @classmethod
    def joined(cls, parts: Iterable["Signatures"], *, texts: int) -> "Signatures":
        """The texts of all parts, so many and at least one, in order; a part is not kept."""
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
        """A byte of each minimum of these texts, a row each, of what they say in whole and of their own."""
        return self.whole[places], self.own[places]


class Minimal(Protocol):
    """Signatures as far as pairs are estimated by them."""

    def minima_at(self, places: Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """As `Signatures.minima_at`."""


class Band:
    """Texts by their hashes in one band."""

    def __init__(self, hashes: Minima, rows: Numbers) -> None:
        """As `sorted_band` gives them; of each text there are nine bytes or ten."""
        self._hashes, self._rows = hashes, rows.astype(np.uint32)
        bits = min((4 * len(rows)).bit_length(), 32)
        self._shift = np.uint32(32 - bits)
        is_taken = np.zeros(max(8, 2**bits), bool)
        is_taken[hashes >> self._shift] = True
        self._taken = np.packbits(is_taken, bitorder="little")

    def with_hash(self, hashes: Minima, *, most: int) -> tuple[Numbers, Numbers]:
        """Pairs of a place in `hashes` and a text that has the hash there; for each place at most so many."""
        slots = hashes >> self._shift  # most have none: asked of a small table first, of one bit each
        places = np.flatnonzero(self._taken[slots >> np.uint32(3)] >> (slots & np.uint32(7)) & np.uint32(1))
        begin = np.searchsorted(self._hashes, hashes[places])
        is_there = self._hashes[begin.clip(max=len(self._hashes) - 1)] == hashes[places]
        places, begin = places[is_there], begin[is_there]
        found = np.minimum(np.searchsorted(self._hashes, hashes[places], "right") - begin, most)
        offsets = np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
        return np.repeat(places, found), self._rows[np.repeat(begin, found) + offsets].astype(np.int64)


class MinHash:
    """As many bands of as many minima as find pairs of this similarity, the same ones on every machine."""

    def __init__(self, similarity: float) -> None:
        minima = round(math.log(SELECTIVITY) / math.log(similarity)) if similarity < 1 else MOST_MINIMA
        minima = min(max(minima, FEWEST_MINIMA), MOST_MINIMA)
        is_found = similarity**minima
        number = math.ceil(math.log(MISSED) / math.log1p(-is_found)) if is_found < 1 else 1
        self.similarity = similarity
        self.bands = min(number, MOST_BANDS)
        self._whole, self._own = self.bands * (minima - minima // 2), self.bands * (minima // 2)

    def signatures(self, hashes: Hashes, rows: Rows, is_whole: Marks, is_own: Marks, *, texts: int) -> Signatures:
        """Of a batch of so many texts, by their hashes, of mixed bits, whose each one is, and of which sets."""
        whole = minima_of(hashes, rows, is_whole, texts=texts, bins=self._whole)
        own = minima_of(hashes * np.uint64(BASE), rows, is_own, texts=texts, bins=self._own)
        of_a_band = np.concatenate([whole.reshape(self.bands, -1, texts), own.reshape(self.bands, -1, texts)], axis=1)
        is_found = own[0] != EMPTY
        return Signatures(_combined(of_a_band), whole.T.astype(np.uint8), own.T.astype(np.uint8), is_found)

    def likely(self, ours: Minimal, rows: Numbers, theirs: Minimal, others: Numbers) -> npt.NDArray[np.float32]:
        """How similar each pair seems: of both sets the less similar, or -1 where it cannot be as much as asked."""
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
    """The hashes of the marked texts, sorted, and whose they are: among equals, in the order of the texts."""
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
    """Of each bin, a row, and each text, a column, the smallest number of the marked hashes, and `EMPTY` of no hashes.

    The upper half of a hash says which bin it falls into, and the lower is its number.
    """
    found = np.full((texts, bins), EMPTY, np.uint32)
    cells = rows * bins + ((hashes >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).view(np.int64)
    np.minimum.at(found.reshape(-1), cells, np.where(is_in, hashes.astype(np.uint32), EMPTY))
    return _densified(np.ascontiguousarray(found.T))


def _densified(sparse: Minima) -> Minima:
    """With what each empty bin borrows."""
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
    """Of each bin, a column, all bins in the order in which it asks them."""
    return np.argsort(mixed(np.arange(bins * bins, dtype=np.uint64) + np.uint64(BASE)).reshape(bins, bins), axis=0)


def _combined(minima: Minima) -> Minima:
    """The numbers along the second axis as one."""
    factors = mixed(np.arange(1, minima.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (mixed((minima * factors[:, np.newaxis]).sum(axis=1)) >> np.uint64(32)).astype(np.uint32)
