"""Hashes to compare texts by: of shingles of characters, of words and of runs of words, a batch at once; pure.

All hashes have 64 bits and depend on the text alone, so that the same texts are judged alike on every machine.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

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
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0xABFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese): each character is a word."""
CELLS = 2**22
"""Counters of the first, coarse count: 16 MiB as uint32."""
_WORD = re.compile(r"\w+")
_SAID_IN_ASCII = bytes(ord(chr(each).lower() if _WORD.match(chr(each)) else " ") for each in range(128)).ljust(256)
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
        """Make a batch of at least one text."""
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
    def starts(self) -> Places:
        """The index of each text's first character."""
        return np.concatenate([[0], self.ends[:-1]])

    @cached_property
    def is_word(self) -> Marks:
        """One flag per character: whether it belongs to a word."""
        return self.characters != SPACE

    @cached_property
    def row_of(self) -> Rows:
        """For each character, the index of its text."""
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
        return self._hashed(self._values, self.starts)

    def words(self) -> "Words":
        """The words of the batch, and where each begins."""
        begins, is_alone = self.is_word.copy(), self._are_alone()
        begins[1:] &= ~self.is_word[:-1] | is_alone[1:] | is_alone[:-1]
        first = np.flatnonzero(begins)
        values = np.where(self.is_word, self._values, np.uint64(0))  # a space adds nothing
        return Words(self._hashed(values, first), first, np.searchsorted(first, self.ends))

    def _are_alone(self) -> Marks:
        points = self.characters
        is_alone = np.zeros(len(points), bool)
        for first, last in UNSPACED if points.dtype == np.uint32 else ():
            is_alone |= (points >= first) & (points <= last)
        return is_alone

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

    def row_of(self, words: Places) -> Rows:
        """For each of these words, which ascend, the index of its text."""
        return np.searchsorted(self.ends, words, "right")

    def outside(self, shared: "Known", batch: Batch) -> Marks:
        """One flag per character of the batch: whether it belongs to a word that no shared run covers."""
        hashes, first = self.runs()
        found = first[shared.has(hashes)]
        if not len(found):
            return batch.is_word
        depth = np.zeros(len(self.hashes) + 1, np.int64)
        np.add.at(depth, found, 1)
        np.add.at(depth, found + WORDS, -1)
        is_outside = np.concatenate([[True], np.cumsum(depth[:-1]) == 0])  # first, what stands before the first word
        return batch.is_word & np.repeat(is_outside, np.diff(self.first, prepend=0, append=len(batch.characters)))


def mixed(hashes: Hashes) -> Hashes:
    """The hashes with their bits mixed, so that each depends on all: the finalizer of SplitMix64."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


class Known:
    """A set of hashes for look-ups: a table with one hash per slot, and a list of those whose slot was taken."""

    def __init__(self, hashes: Hashes) -> None:
        """`hashes` are sorted, and their bits are mixed."""
        bits = (4 * len(hashes)).bit_length()
        self._shift = np.uint64(64 - bits)
        slots = self._slots(hashes)
        self._table = np.full(2**bits, hashes[0] if len(hashes) else 0, np.uint64)
        self._table[slots] = hashes
        self._others = hashes[self._table[slots] != hashes]
        self._is_crowded = np.zeros(2**bits, bool)
        self._is_crowded[self._slots(self._others)] = True
        self._size = len(hashes)

    def __len__(self) -> int:
        return self._size

    def has(self, hashes: Hashes) -> Marks:
        """One flag per hash: whether it is in the set."""
        if not len(self):
            return np.zeros(len(hashes), bool)
        slots = self._slots(hashes)
        is_known = self._table[slots] == hashes
        rest = np.flatnonzero(self._is_crowded[slots] & ~is_known)
        places = np.searchsorted(self._others, hashes[rest]).clip(max=len(self._others) - 1)
        is_known[rest] = self._others[places] == hashes[rest]
        return is_known

    def _slots(self, hashes: Hashes) -> Places:
        return (hashes >> self._shift).view(np.int64)


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
    pending: list[Hashes] = []
    seen, counts, size = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0
    for hashes, rows in again():
        kept = coarse[_cell(hashes)] > more_than
        pending.append(_once_a_text(hashes[kept], rows[kept]))
        size += len(pending[-1])
        if size > max(CELLS, len(seen)):
            seen, counts, pending, size = *_merged(seen, counts, pending), [], 0
    seen, counts = _merged(seen, counts, pending)
    return seen[counts > more_than]


def _merged(
    seen: Hashes, counts: npt.NDArray[np.int64], pending: Sequence[Hashes]
) -> tuple[Hashes, npt.NDArray[np.int64]]:
    new, how_often = np.unique(np.concatenate([seen[:0], *pending]), return_counts=True)
    both, inverse = np.unique(np.concatenate([seen, new]), return_inverse=True)
    total = np.zeros(len(both), np.int64)
    np.add.at(total, inverse, np.concatenate([counts, how_often]))
    return both, total


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
    found = np.zeros(0x110000, bool)
    for word in _WORD.finditer(np.arange(len(found), dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")):
        found[word.start() : word.end()] = True
    return found


def in_batches(texts: Iterable[str], *, max_texts: int = 512, max_chars: int = 2**16) -> Iterator[list[str]]:
    """Yield the texts in batches, which end with the text that reaches `max_texts` texts or `max_chars` characters."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == max_texts or chars >= max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
