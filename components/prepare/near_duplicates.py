"""Find near-duplicate prompts, between training and held-out records and within training; pure.

Two prompts are near-duplicates if the Jaccard similarity of their shingles reaches the threshold twice: for the whole
texts, and for their own texts. Shingles are the sets of five consecutive characters, without case, punctuation and
white space. A prompt's own text is the prompt without shared text. Shared text is every run of eight words that occurs
in more than ten different prompts, such as a task's instruction, a document with many questions, or a form letter.

So neither a common instruction makes two prompts near, nor a common page, nor the same question about two pages.
Prompts with the same words always are near-duplicates.

The bound of ten is from GPT-3 (arXiv:2005.14165, appendix C), whose authors took an overlap with more than ten
documents for boilerplate and not for a leak. A page with ten questions or fewer is therefore not shared text, and its
questions are near if the page is most of each prompt: data.group keeps them together.

Shingles that occur in more than a twentieth of the held-out prompts are ignored, so that a common short phrase does not
count as similarity. `MinHash` finds the candidates, and the exact sets decide. The cost is linear in the number of
prompts; texts are read in batches, and what is kept of each is on disk.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.prepare.rows import in_batches

# Hashes to compare texts by: of shingles of characters, of words and of runs of words, a batch at once; pure. All have
# 64 bits and depend on the text alone, so that the same texts are judged alike on every machine.

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
"""For each hash, the index of its text in the batch; ascending."""
Places = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

CHARS = 5
WORDS = 8
"""Words in a run: the fewest by which GPT-3's authors looked for overlaps (arXiv:2005.14165, appendix C)."""
FACTORS: Hashes = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5],
    dtype=np.uint64,
)
"""xxHash's primes, one for each character of a shingle."""
BASE = 0x9E3779B97F4A7C15
"""Base of the polynomial hashes of words, runs and texts: the golden ratio's digits, odd to have a modular inverse."""
SPACE = ord(" ")
UNSPACED = ((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xABFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese): each character is a word."""
CELLS = 2**22
"""Counters of the first, coarse count: 16 MiB as uint32."""
_WORD = re.compile(r"\w+")
_SAID_IN_ASCII = bytes(ord(chr(code).lower() if _WORD.match(chr(code)) else " ") for code in range(128)).ljust(256)
"""Translation table for ASCII text: characters of words in lower case, all others as spaces."""


@dataclass(frozen=True)
class Batch:
    """The words of some texts, concatenated, without case and punctuation; white space is single spaces."""

    characters: npt.NDArray[np.uint8] | npt.NDArray[np.uint32]
    """Code points of each text's words, a space after each, padded with spaces to at least CHARS + 1 characters."""
    ends: Places
    """The end of each text in `characters`, exclusive."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Batch":
        together = "\n".join([*texts, ""])
        characters: npt.NDArray[Any]
        if together.isascii():  # the same words, in a third of the time
            characters = np.frombuffer(together.encode().translate(_SAID_IN_ASCII), np.uint8)
        else:
            texts = [text.casefold() for text in texts]
            points = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
            characters = np.where(_are_of_words()[points], points, np.uint32(SPACE))
        is_kept = characters != SPACE
        is_kept[1:] |= is_kept[:-1]
        ends = np.cumsum([len(text) + 1 for text in texts])
        ends -= np.searchsorted(np.flatnonzero(~is_kept), ends)
        characters = characters[is_kept]
        missing = (CHARS + 1 - np.diff(ends, prepend=0)).clip(min=0)
        if missing.any():
            characters = np.insert(characters, np.repeat(ends, missing), SPACE)
            ends += np.cumsum(missing)
        return cls(characters, ends)

    @cached_property
    def is_word(self) -> Marks:
        return self.characters != SPACE

    @cached_property
    def row_of(self) -> Rows:
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    def shingles(self) -> tuple[Hashes, Marks]:
        """The hash of every five consecutive characters, and one flag per hash: whether the five are of one text."""
        wide = self.characters.astype(np.uint64)
        size = len(wide) - CHARS + 1
        hashes = wide[:size] * FACTORS[0]
        for place in range(1, CHARS):
            hashes += wide[place : place + size] * FACTORS[place]
        is_one = np.ones(len(wide), bool)
        for back in range(1, CHARS + 1):
            is_one[self.ends - back] = False
        return mixed(hashes), is_one[:size]

    def texts(self) -> Hashes:
        """One hash per text, of all of it."""
        return self._hashed(self._values, np.concatenate([[0], self.ends[:-1]]))

    def words(self) -> "Words":
        begins, is_alone = self.is_word.copy(), np.zeros(len(self.characters), bool)
        for start, end in UNSPACED if self.characters.dtype == np.uint32 else ():
            is_alone |= (self.characters >= start) & (self.characters <= end)
        begins[1:] &= ~self.is_word[:-1] | is_alone[1:] | is_alone[:-1]
        first = np.flatnonzero(begins)
        values = np.where(self.is_word, self._values, np.uint64(0))  # a space adds nothing
        return Words(self._hashed(values, first), first, np.searchsorted(first, self.ends))

    @cached_property
    def _values(self) -> Hashes:
        """One term per character of the polynomial that hashes are sums of, modulo 2**64."""
        return (self.characters.astype(np.uint64) + np.uint64(1)) * _powers(BASE, len(self.characters))

    def _hashed(self, values: Hashes, starts: Places) -> Hashes:
        """The hash of each segment between one of `starts` and the next, independent of where the segment stands."""
        if not len(starts):
            return np.zeros(0, np.uint64)
        return mixed(np.add.reduceat(values, starts) * _powers(pow(BASE, -1, 2**64), len(values))[starts])


@dataclass(frozen=True)
class Words:
    """The words of a batch."""

    hashes: Hashes
    first: Places
    """The index of each word's first character."""
    ends: Places
    """The end of each text in the words, exclusive."""

    def runs(self) -> tuple[Hashes, Places]:
        """The hash, and the index of the first word, of every run of eight words in one text."""
        size = len(self.hashes) - WORDS + 1
        if size < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes = np.zeros(size, np.uint64)
        for place, factor in enumerate(_powers(BASE, WORDS)):
            hashes += self.hashes[place : place + size] * factor
        is_one = np.ones(len(self.hashes), bool)
        for back in range(1, WORDS):  # A negative index wraps around to the end, where no run begins either.
            is_one[self.ends - back] = False
        within = np.flatnonzero(is_one[:size])
        return mixed(hashes[within]), within

    def outside(self, shared: Hashes, batch: Batch) -> Marks:
        """One flag per character of the batch: whether it belongs to a word that no shared run covers."""
        hashes, first = self.runs()
        covered = first[are_in(hashes, shared)]
        if not len(covered):
            return batch.is_word
        depth = np.zeros(len(self.hashes) + 1, np.int64)
        np.add.at(depth, covered, 1)
        np.add.at(depth, covered + WORDS, -1)
        is_outside = np.concatenate([[True], np.cumsum(depth[:-1]) == 0])  # first, what stands before the first word
        return batch.is_word & np.repeat(is_outside, np.diff(self.first, prepend=0, append=len(batch.characters)))


def mixed(hashes: Hashes) -> Hashes:
    """The hashes with their bits mixed, so that each depends on all: the finalizer of SplitMix64."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def are_in(hashes: Hashes, among: Hashes) -> Marks:
    """One flag per hash: whether it is one of those that are known."""
    if not len(among):
        return np.zeros(len(hashes), bool)
    marks: Marks = pc.is_in(pa.array(hashes), value_set=pa.array(among)).to_numpy(zero_copy_only=False)
    return marks


def frequent(
    first: Iterable[Hashes], again: Callable[[], Iterable[tuple[Hashes, Rows]]], *, more_than: float
) -> Hashes:
    """The hashes that are in more than `more_than` texts, sorted. They are given for some texts at a time, bits mixed.

    Exact, in memory that does not grow with the number of hashes: a coarse count of all of `first`, which is never too
    low, and if needed an exact count, over `again`, of those alone that pass it. `again` is all or a part of `first`.
    """
    coarse = np.zeros(CELLS, np.uint32)
    for hashes in first:
        np.add.at(coarse, _cell(hashes), np.uint32(1))
    if not (coarse > more_than).any():
        return np.zeros(0, np.uint64)
    pending = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
    size, most = 0, CELLS
    for hashes, rows in again():
        is_kept = coarse[_cell(hashes)] > more_than
        pending.append(np.unique(_once_a_text(hashes[is_kept], rows[is_kept]), return_counts=True))
        size += len(pending[-1][0])
        if size > most:
            pending = [_merged(pending)]
            size = len(pending[0][0])
            most = max(CELLS, 2 * size)
    seen, counts = _merged(pending)
    return seen[counts > more_than]


def _merged(counted: Sequence[tuple[Hashes, Places]]) -> tuple[Hashes, Places]:
    """Each hash once, and the sum of its counts."""
    hashes, inverse = np.unique(np.concatenate([part for part, _ in counted]), return_inverse=True)
    counts = np.zeros(len(hashes), np.int64)
    np.add.at(counts, inverse, np.concatenate([part for _, part in counted]))
    return hashes, counts


def _once_a_text(hashes: Hashes, rows: Rows) -> Hashes:
    """The hashes of all texts, sorted, each once per text."""
    order = np.argsort(hashes, kind="stable")  # stable: the rows of each hash keep ascending
    hashes, rows = hashes[order], rows[order]
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[is_first]


def _cell(hashes: Hashes) -> Places:
    return ((hashes >> np.uint64(32)) * np.uint64(CELLS) >> np.uint64(32)).view(np.int64)


def _powers(base: int, count: int) -> Hashes:
    return _some_powers(base, count.bit_length())[:count]


@lru_cache(maxsize=8)
def _some_powers(base: int, bits: int) -> Hashes:
    powers = np.full(2**bits, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


@cache
def _are_of_words() -> Marks:
    """One flag per Unicode code point: whether it belongs to a word."""
    marks = np.zeros(0x110000, bool)
    for word in _WORD.finditer(np.arange(len(marks), dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")):
        marks[word.start() : word.end()] = True
    return marks


def batches_of(texts: Iterable[str], *, most: int = 2048, most_chars: int = 2**17) -> Iterator[list[str]]:
    """The texts in batches whose words are compared at once."""
    return in_batches(texts, len, most=most, most_size=most_chars)


# MinHash with banding (Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4): find the
# pairs of similar sets of hashes without comparing all pairs.
#
# Each text has two sets, the shingles of the whole text and those of its own part, and two texts are similar if both
# are. So each band holds minima of both sets, and a pair with only one of them similar seldom shares a band.
#
# The minima come from one permutation (Li, Owen and Zhang, 2012, arXiv:1208.1259): the hashes of a set are divided into
# as many bins as there are minima, and each bin gives its smallest. An empty bin copies the minimum of the first bin
# that is not empty, in an order that depends on the empty bin alone (Shrivastava, 2017, arXiv:1703.04664), so that the
# share of equal minima is an unbiased estimate of the similarity.
#
# Of pairs exactly at the threshold, a few in ten thousand are missed if the larger set has ten hashes or more.

MISSED = 1e-4
"""Probability that no band finds a pair exactly at the threshold, if the minima were independent."""
SELECTIVITY = 0.3
"""Approximate probability that one band finds such a pair. It decides how many minima a band holds."""
FEWEST_MINIMA, MOST_MINIMA, MOST_BANDS = 2, 8, 256
DEVIATIONS = 5
"""How many standard deviations, of independent minima, an estimate may lie below the threshold."""
EMPTY = np.uint32(2**32 - 1)
"""The minimum of an empty set."""
PAIRS_AT_ONCE = 2**12

Minima = npt.NDArray[np.uint32]
MinimaAt = Callable[[Places], npt.NDArray[np.uint8]]
"""One byte of each minimum of the texts at these places, a row per text: of the whole text, then of its own part."""


@dataclass(frozen=True)
class Signatures:
    """The signatures of some texts: the hash of each band, and one byte of each minimum, to estimate similarity."""

    bands: Minima
    """One row per band, one column per text."""
    minima: npt.NDArray[np.uint8]
    """One row per text, as in `MinimaAt`."""
    is_found: Marks
    """False for a text without an own part, which no band proposes."""


class Band:
    """An index of texts by their hash in one band, of nine or ten bytes per text."""

    def __init__(self, hashes: Minima, rows: Places) -> None:
        """`hashes` and `rows` as `Signed.in_band` returns them."""
        self._hashes, self._rows = hashes, rows.astype(np.uint32)
        bits = min((4 * len(rows)).bit_length(), 32)
        self._shift = np.uint32(32 - bits)
        is_taken = np.zeros(max(8, 2**bits), bool)
        is_taken[hashes >> self._shift] = True
        self._taken = np.packbits(is_taken, bitorder="little")

    def with_hash(self, hashes: Minima, *, most: int) -> tuple[Places, Places]:
        """Pairs of an index into `hashes` and a text with that hash, at most `most` texts per index."""
        slots = hashes >> self._shift  # most hashes have no text: a table of one bit per slot rules them out first
        places = np.flatnonzero(self._taken[slots >> 3] >> (slots & 7) & 1)
        begin = np.searchsorted(self._hashes, hashes[places])
        is_there = self._hashes[begin.clip(max=len(self._hashes) - 1)] == hashes[places]
        places, begin = places[is_there], begin[is_there]
        counts = np.minimum(np.searchsorted(self._hashes, hashes[places], "right") - begin, most)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(places, counts), self._rows[np.repeat(begin, counts) + offsets].astype(np.int64)


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
        factors = mixed(np.arange(1, of_a_band.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        bands = (mixed((of_a_band * factors[:, np.newaxis]).sum(axis=1)) >> np.uint64(32)).astype(np.uint32)
        return Signatures(bands, np.concatenate([whole, own]).T.astype(np.uint8), own[0] != EMPTY)

    def likely(self, ours: MinimaAt, rows: Places, theirs: MinimaAt, others: Places) -> npt.NDArray[np.float32]:
        """Estimated similarity of each pair, the lower one of both sets, or -1 if it is surely below the threshold."""
        lower = [np.zeros(0, np.float32)]
        for start in range(0, len(rows), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            is_equal, estimates = ours(rows[part]) == theirs(others[part]), []
            for of_a_set in (is_equal[:, : self._whole], is_equal[:, self._whole :]):
                agreeing = of_a_set.mean(axis=1, dtype=np.float32)
                deviation = math.sqrt(self.similarity * (1 - self.similarity) / of_a_set.shape[1])
                least = self.similarity - DEVIATIONS * deviation - 1e-6
                estimates.append(np.where(agreeing >= least, agreeing, np.float32(-1)))
            lower.append(np.minimum(*estimates))
        return np.concatenate(lower)


def minima_of(hashes: Hashes, rows: Rows, is_in: Marks, *, texts: int, bins: int) -> Minima:
    """The minima of each text, one row per bin and one column per text; `EMPTY` for a text without marked hashes.

    The upper half of a hash selects its bin, and the lower half is the number that is compared.
    """
    minima = np.full((texts, bins), EMPTY, np.uint32)
    cells = rows * bins + ((hashes >> np.uint64(32)) * np.uint64(bins) >> np.uint64(32)).view(np.int64)
    np.minimum.at(minima.reshape(-1), cells, np.where(is_in, hashes.astype(np.uint32), EMPTY))
    sparse = np.ascontiguousarray(minima.T)
    dense, lenders = sparse.copy(), iter(lenders_of(bins))
    is_empty = (sparse == EMPTY) & (sparse.min(axis=0) != EMPTY)
    while np.count_nonzero(is_empty) > is_empty.size // 16:  # of short texts they are many: all at once
        dense &= sparse[next(lenders)] | (is_empty.astype(np.uint32) - np.uint32(1))  # `EMPTY` has every bit
        is_empty &= dense == EMPTY
    empty, of_texts = np.nonzero(is_empty)
    while len(empty):
        dense[empty, of_texts] = lent = sparse[next(lenders)[empty], of_texts]
        is_still = lent == EMPTY
        empty, of_texts = empty[is_still], of_texts[is_still]
    return dense


@cache
def lenders_of(bins: int) -> Places:
    """One column per bin: all bins, in the order in which an empty bin tries them."""
    return np.argsort(mixed(np.arange(bins * bins, dtype=np.uint64) + np.uint64(BASE)).reshape(bins, bins), axis=0)


class Signed:
    """Signatures of many texts on disk, added a batch at a time; nine bytes per text stay in memory.

    The file of bands holds the batches one after the other, each a row per band; the file of minima a row per text.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Create two files with this name in the folder."""
        self._bands, self._minima = folder / f"{name}.bands", folder / f"{name}.minima"
        for path in (self._bands, self._minima):
            path.write_bytes(b"")
        self._num_bands = 0
        self._equals = [np.zeros(0, np.uint64)]
        self._are_found = [np.zeros(0, bool)]

    def add(self, signatures: Signatures, equals: Hashes) -> None:
        for path, array in ((self._bands, signatures.bands), (self._minima, signatures.minima)):
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
        self._num_bands = len(signatures.bands)
        self._equals.append(equals)
        self._are_found.append(signatures.is_found)

    def __len__(self) -> int:
        return sum(map(len, self._equals))

    @property
    def equals(self) -> Hashes:
        return np.concatenate(self._equals)

    def in_band(self, band: int, kept: Marks) -> tuple[Minima, Places]:
        """The band's hashes of the texts marked in `kept`, sorted, and the texts; those of equal hashes in order."""
        hashes, begin = np.empty(len(kept), np.uint32), 0
        with self._bands.open("rb") as file:
            for size in map(len, self._equals):
                file.seek(hashes.itemsize * (begin * self._num_bands + band * size))
                file.readinto(hashes[begin : begin + size].data)
                begin += size
        rows = np.flatnonzero(kept & np.concatenate(self._are_found))
        # Each hash with its text as one number: NumPy sorts numbers faster than it finds their order.
        packed = hashes[rows].astype(np.uint64) << np.uint64(32) | rows.view(np.uint64)
        packed.sort()
        return (packed >> np.uint64(32)).astype(np.uint32), (packed & np.uint64(2**32 - 1)).view(np.int64)

    def minima_at(self, places: Places) -> npt.NDArray[np.uint8]:
        """`MinimaAt` of these signatures. The file is mapped anew each time, so that no page stays in memory."""
        return np.asarray(np.memmap(self._minima, np.uint8, "r").reshape(len(self), -1)[places])


COMMON, COMMON_AT_LEAST = 0.05, 3
"""A shingle in more than this share of the held-out prompts, and in more than this number of them, is ignored."""
SHARED, SHARED_AT_LEAST = 0.01, 10
"""A run of words in more than this share of all prompts, and in more than this number of different ones, is shared."""
MOST_IN_BAND, MOST_COMPARED = 64, 16
"""At most how many held-out prompts one band may propose, and how many of all proposals, the most similar first, are
compared exactly. It bounds the work where many prompts are alike, of which any one may stand for the others."""
KEPT_BYTES = 2**27
"""Bound on the cache of shingle sets that the next comparison may need."""
AHEAD = 64
"""Texts whose shingles are made in one batch."""


class _ShingleSets(NamedTuple):
    """Shingles of one text, the whole and its own part: each hash once, sorted."""

    whole: Hashes
    own: Hashes


class _Shingled(NamedTuple):
    hashes: Hashes
    rows: Rows
    is_whole: Marks
    """For each hash, whether it counts in the whole text's set."""
    is_own: Marks
    """For each hash, whether it also counts in the own part's set: some of it lies outside shared text."""
    equals: Hashes
    """For each text, one hash of all of it."""


class Comparison:
    """Compares the prompts of one corpus. What is shared text is learned from `prompts` and `held_out` together."""

    def __init__(self, prompts: Sequence[str], held_out: Sequence[str], *, similarity: float, folder: Path) -> None:
        """`similarity` is above 0 and at most 1. The texts are kept, and not copied; their signatures lie in files in
        `folder`, which are the caller's to remove."""
        self._held_out = held_out
        self._minhash = MinHash(similarity)
        self._signed = Signed(folder, "prompts")
        """Signatures of the prompts that were compared with the held-out ones."""
        self._signed_held_out = Signed(folder, "held_out")
        most = max(COMMON_AT_LEAST, COMMON * len(held_out))
        shingles = (hashes for hashes, _ in _shingles_in(held_out))
        self._common = frequent(shingles, lambda: _shingles_in(held_out), more_than=most)
        most = max(SHARED_AT_LEAST, SHARED * (len(prompts) + len(held_out)))
        self._shared = _frequent_runs(held_out, prompts, more_than=most)
        for batch in batches_of(held_out):
            self._signed_held_out.add(*self._signatures(batch))

    def near_held_out(self, prompts: Iterable[str]) -> Iterator[int | None]:
        """For each prompt, in order, the index of a held-out prompt that it is near to, if any. Lazy, in batches."""
        theirs = self._signed_held_out
        every = np.ones(len(self._held_out), bool)
        bands = [Band(*theirs.in_band(band, every)) for band in range(self._minhash.bands)]
        distinct, first = np.unique(theirs.equals, return_index=True)
        sets = _Sets(self, self._held_out)
        for batch in batches_of(prompts):
            ours, equals = self._signatures(batch)
            self._signed.add(ours, equals)
            places = np.searchsorted(distinct, equals).clip(max=len(distinct) - 1)
            is_equal = distinct[places] == equals
            near = [row if same else None for row, same in zip(first[places].tolist(), is_equal.tolist(), strict=True)]
            candidates = list(self._candidates(ours, np.flatnonzero(ours.is_found & ~is_equal), bands))
            own_sets = _Sets(self, batch)
            own_sets.make(row for row, _ in candidates)
            sets.make(others[0] for _, others in candidates)
            for row, others in candidates:
                near[row] = next((other for other in others if self._are_near(own_sets[row], sets[other])), None)
            yield from near

    def repeats(self, prompts: Sequence[str], kept: Marks) -> int:
        """How many of the prompts marked in `kept` are near an earlier marked one. `prompts` are the ones that
        `near_held_out` has read, and perhaps more, which are not marked.

        Within a band each prompt is compared with the first and with the previous one, not with all.
        """
        size = len(self._signed)
        kept, is_repeat = kept[:size], np.zeros(size, bool)
        same = np.flatnonzero(kept)
        is_repeat[same] = True
        is_repeat[same[np.unique(self._signed.equals[same], return_index=True)[1]]] = False
        sets, seen = _Sets(self, prompts), np.zeros(0, np.int64)
        for band in range(self._minhash.bands):
            pairs = np.setdiff1d(_neighbours(*self._signed.in_band(band, kept), size=size), seen, assume_unique=True)
            rows, others = np.divmod(pairs[~is_repeat[pairs // size]], size)
            likely = self._minhash.likely(self._signed.minima_at, rows, self._signed.minima_at, others) >= 0
            pending, compared = zip(rows[likely].tolist(), others[likely].tolist(), strict=True), []
            while some := list(islice(pending, AHEAD)):
                sets.make(chain.from_iterable(pair for pair in some if not is_repeat[pair[0]]))
                for row, other in some:
                    if not is_repeat[row]:
                        is_repeat[row] = self._are_near(sets[row], sets[other])
                        compared.append(row * size + other)
            seen = np.union1d(seen, np.array(compared, np.int64))
        return int(np.count_nonzero(is_repeat))

    def shingle_sets(self, texts: Iterable[str]) -> Iterator[_ShingleSets]:
        for shingled in map(self._shingled, batches_of(texts)):
            starts = np.searchsorted(shingled.rows, np.arange(len(shingled.equals) + 1)).tolist()
            for part in map(slice, starts[:-1], starts[1:]):
                hashes, is_whole, is_own = shingled.hashes[part], shingled.is_whole[part], shingled.is_own[part]
                whole = np.unique(hashes[is_whole])
                yield _ShingleSets(whole, whole if (is_own == is_whole).all() else np.unique(hashes[is_own]))

    def _are_near(self, one: _ShingleSets, other: _ShingleSets) -> bool:
        least = self._minhash.similarity - 1e-9
        if _jaccard(one.own, other.own) < least:
            return False
        return (one.own is one.whole and other.own is other.whole) or _jaccard(one.whole, other.whole) >= least

    def _shingled(self, texts: Sequence[str]) -> _Shingled:
        batch = Batch.of(texts)
        hashes, is_whole = batch.shingles()
        is_whole &= ~are_in(hashes, self._common)
        outside = batch.words().outside(self._shared, batch) if len(self._shared) else batch.is_word
        is_own = np.zeros(len(hashes), bool)
        for place in range(CHARS):
            is_own |= outside[place : place + len(hashes)]
        return _Shingled(hashes, batch.row_of[: len(hashes)], is_whole, is_own & is_whole, batch.texts())

    def _signatures(self, texts: Sequence[str]) -> tuple[Signatures, Hashes]:
        shingled = self._shingled(texts)
        marks = (shingled.is_whole, shingled.is_own)
        return self._minhash.signatures(shingled.hashes, shingled.rows, *marks, texts=len(texts)), shingled.equals

    def _candidates(self, ours: Signatures, rows: Places, bands: Sequence[Band]) -> Iterator[tuple[int, list[int]]]:
        """For each row that has any, the held-out texts to compare it with, the most similar first."""
        proposed = [np.zeros((2, 0), np.int64)]
        for band, hashes in zip(bands, ours.bands, strict=True):
            proposed.append(np.stack(band.with_hash(hashes[rows], most=MOST_IN_BAND)))
        places, others = np.concatenate(proposed, axis=1)
        pairs = np.unique(rows[places] * len(self._held_out) + others)
        rows, others = np.divmod(pairs, len(self._held_out))
        likely = self._minhash.likely(ours.minima.__getitem__, rows, self._signed_held_out.minima_at, others)
        order = np.lexsort((others, -likely, rows))
        order = order[likely[order] >= 0]
        sorted_pairs = zip(rows[order].tolist(), others[order].tolist(), strict=True)
        for row, group in groupby(sorted_pairs, key=lambda pair: pair[0]):
            yield row, [other for _, other in islice(group, MOST_COMPARED)]


class _Sets:
    """The sets of some texts, made on first use, and kept until they are many."""

    def __init__(self, comparison: Comparison, texts: Sequence[str]) -> None:
        self._comparison = comparison
        self._texts = texts
        self._kept: dict[int, _ShingleSets] = {}
        self._bytes = 0

    def make(self, rows: Iterable[int]) -> None:
        """Make the sets of these texts in one batch, which is faster than one by one."""
        if self._bytes > KEPT_BYTES:
            self._kept, self._bytes = {}, 0
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        for row, sets in zip(missing, self._comparison.shingle_sets(self._texts[row] for row in missing), strict=True):
            self._kept[row] = sets
            self._bytes += sets.whole.nbytes + sets.own.nbytes

    def __getitem__(self, row: int) -> _ShingleSets:
        self.make([row])
        return self._kept[row]


def _frequent_runs(*parts: Iterable[str], more_than: float) -> Hashes:
    """The runs of eight words in more than `more_than` different texts, sorted. The texts are read twice."""
    equals = [np.zeros(0, np.uint64)]

    def batches() -> Iterator[Batch]:
        return (Batch.of(texts) for part in parts for texts in batches_of(part))

    def of_all() -> Iterator[Hashes]:
        for batch in batches():
            equals.append(batch.texts())
            yield batch.words().runs()[0]

    def of_different() -> Iterator[tuple[Hashes, Rows]]:
        is_new = np.zeros(sum(map(len, equals)), bool)
        is_new[np.unique(np.concatenate(equals), return_index=True)[1]] = True
        start = 0
        for batch in batches():
            words = batch.words()
            hashes, first = words.runs()
            rows = np.searchsorted(words.ends, first, "right")
            of_new = is_new[start + rows]
            start += len(batch.ends)
            yield hashes[of_new], rows[of_new]

    return frequent(of_all(), of_different, more_than=more_than)


def _shingles_in(texts: Iterable[str]) -> Iterator[tuple[Hashes, Rows]]:
    for batch in map(Batch.of, batches_of(texts)):
        hashes, is_one = batch.shingles()
        yield hashes[is_one], batch.row_of[: len(hashes)][is_one]


def _neighbours(keys: Minima, rows: Places, *, size: int) -> Places:
    """Pair each row, in order of the keys, with the first row of its key and the previous one: row * size + other."""
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    starts, places = np.flatnonzero(begins), np.flatnonzero(~begins)
    first = starts[np.searchsorted(starts, places) - 1]
    return np.unique(np.concatenate([rows[places] * size + rows[others] for others in (first, places - 1)]))


def _jaccard(one: Hashes, other: Hashes) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 0.0
