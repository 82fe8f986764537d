"""MinHash: of two sets of hashes a few numbers each, by which similar pairs are found without looking at all; pure.

Of a text there are two sets, what it says in whole and what of that it says of its own, and two texts are similar when
both are. So each band holds minima of both, and a pair that only one of them makes similar seldom shares a band.
Broder (1997); Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from components.prepare.shingles import Hashes, Marks, Rows, mixed

MISSED = 1e-4
"""Probability that no band finds a pair of exactly the similarity asked for; one of more similarity is missed less."""
SELECTIVITY = 0.3
"""Probability, about, that one band finds such a pair: it decides how many minima a band holds."""
FEWEST_MINIMA, MOST_MINIMA, MOST_BANDS = 2, 8, 256
DEVIATIONS = 4
"""By how many standard deviations an estimated similarity may lie below the one asked for."""

ROUNDING = 1e-6
PAIRS_AT_ONCE = 2**16

Numbers = npt.NDArray[np.int64]
Minima = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Signatures:
    """Of some texts, a row each: the bands' hashes, and of each minimum a byte, which similarity is estimated by."""

    bands: npt.NDArray[np.uint32]
    whole: npt.NDArray[np.uint8]
    own: npt.NDArray[np.uint8]
    is_found: Marks
    """False for a text that says nothing of its own: no band finds it."""

    @classmethod
    def joined(cls, parts: Iterable["Signatures"], *, texts: int) -> "Signatures":
        """The texts of all parts, so many and at least one, in order; a part is not kept."""
        fields = ("bands", "whole", "own", "is_found")
        arrays: list[npt.NDArray[Any]] = []
        filled = 0
        for part in parts:
            given = [getattr(part, field) for field in fields]
            arrays = arrays or [np.empty((texts, *each.shape[1:]), each.dtype) for each in given]
            for array, each in zip(arrays, given, strict=True):
                array[filled : filled + len(each)] = each
            filled += len(part.is_found)
        return cls(*arrays)

    def where(self, kept: Marks) -> "Signatures":
        """Those of the marked texts."""
        return Signatures(self.bands[kept], self.whole[kept], self.own[kept], self.is_found[kept])

    def in_band(self, band: int) -> tuple[npt.NDArray[np.uint32], Numbers]:
        """The band's hashes, sorted, and whose they are: among equals, in the order of the texts."""
        rows = np.flatnonzero(self.is_found)
        order = np.argsort(self.bands[rows, band], kind="stable")
        return self.bands[rows[order], band], rows[order]


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
        random = np.random.default_rng(0)
        self._factors = random.integers(0, 2**32, self._whole + self._own, dtype=np.uint32) | np.uint32(1)
        self._masks = random.integers(0, 2**32, self._whole + self._own, dtype=np.uint32)

    def signatures(self, hashes: Hashes, rows: Rows, is_own: Marks, *, texts: int) -> Signatures:
        """Of a batch of so many texts, by all their hashes, whose each one is, and whether it is said of its own."""
        short = (hashes >> np.uint64(32)).astype(np.uint32)
        whole = self._minima(short, rows, texts, 0, self._whole)
        own = self._minima(short[is_own], rows[is_own], texts, self._whole, self._own)
        of_a_band = np.concatenate([whole.reshape(self.bands, -1, texts), own.reshape(self.bands, -1, texts)], axis=1)
        is_found = np.bincount(rows[is_own], minlength=texts) > 0
        return Signatures(_combined(of_a_band).T, whole.T.astype(np.uint8), own.T.astype(np.uint8), is_found)

    def _minima(self, hashes: npt.NDArray[np.uint32], rows: Rows, texts: int, first: int, count: int) -> Minima:
        """Of each permutation, the smallest number of each text; of a text without hashes the largest there is."""
        minima = np.full((count, texts), 2**32 - 1, np.uint32)
        present, starts = np.unique(rows, return_index=True)
        permuted = np.empty_like(hashes)
        for place in range(count if len(hashes) else 0):
            np.multiply(hashes, self._factors[first + place], out=permuted)
            np.bitwise_xor(permuted, self._masks[first + place], out=permuted)
            minima[place, present] = np.minimum.reduceat(permuted, starts)
        return minima

    def likely(self, ours: Signatures, rows: Numbers, theirs: Signatures, others: Numbers) -> npt.NDArray[np.float32]:
        """How similar each pair seems: of both sets the less similar, or -1 where it cannot be as much as asked."""
        starts = range(0, len(rows), PAIRS_AT_ONCE)
        parts = [slice(start, start + PAIRS_AT_ONCE) for start in starts]
        found = [self._likely(ours, rows[part], theirs, others[part]) for part in parts]
        return np.concatenate([np.zeros(0, np.float32), *found])

    def _likely(self, ours: Signatures, rows: Numbers, theirs: Signatures, others: Numbers) -> npt.NDArray[np.float32]:
        estimates = []
        for one, other in ((ours.whole, theirs.whole), (ours.own, theirs.own)):
            agreeing = (one[rows] == other[others]).mean(axis=1, dtype=np.float32)
            deviation = math.sqrt(self.similarity * (1 - self.similarity) / one.shape[1])
            estimates.append(np.where(agreeing >= self.similarity - DEVIATIONS * deviation - ROUNDING, agreeing, -1))
        return np.minimum(*estimates)


def _combined(minima: Minima) -> npt.NDArray[np.uint32]:
    """The numbers along the second axis as one."""
    combined = np.zeros((minima.shape[0], minima.shape[2]), np.uint64)
    for place in range(minima.shape[1]):
        combined = mixed(combined ^ minima[:, place].astype(np.uint64))
    return (combined >> np.uint64(32)).astype(np.uint32)
