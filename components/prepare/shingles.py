"""Texts as numbers to compare them by: characters and words a few at a time, hashed a batch at once; pure.

All hashes are of 64 bits and depend on the text alone, so that the same texts are judged alike on every machine.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
"""For each of some hashes, which text of the batch it is of; ascending."""
Marks = npt.NDArray[np.bool_]

CHARS = 5
WORDS = 8
"""In a row, that make a run: the fewest by which GPT-3's authors looked for overlaps (arXiv:2005.14165, appendix C)."""
FACTORS: Hashes = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5],
    dtype=np.uint64,
)
"""xxHash's primes, one for each character of a shingle."""
BASE = 0x9E3779B97F4A7C15
"""Of the polynomials by which words and runs of them are hashed: odd, as the golden ratio has its digits."""
SPACE = ord(" ")
UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0xABFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese): a character is a word."""
CELLS = 2**22
"""Counters of a first, coarse count: 16 MiB of them."""
KEPT_LATELY = 2**16
"""Hashes that are put in order at once, at least."""
_WORD = re.compile(r"\w+")
_WORDS_OF_ASCII = bytes(ord(chr(each).lower() if _WORD.match(chr(each)) else " ") for each in range(128)).ljust(256)
"""What each byte of such a text becomes."""


def said(text: str) -> str:
    """The text without case, punctuation and white space, at least as long as a shingle."""
    if text.isascii():  # the same words, in a tenth of the time
        return b" ".join(text.encode().translate(_WORDS_OF_ASCII).split()).decode().ljust(CHARS)
    return " ".join(_WORD.findall(text.casefold())).ljust(CHARS)


@dataclass(frozen=True)
class Batch:
    """Some texts, as `said` gives them, one behind the other."""

    characters: Hashes
    row_of: Rows
    """Of each character."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Batch":
        """The texts must be as `said` gives them."""
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        row_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        return cls(points.astype(np.uint64), row_of)

    def shingles(self) -> tuple[Hashes, Rows, npt.NDArray[np.int64]]:
        """The hash, the text and the first character of every five characters in a row."""
        size = len(self.characters) - CHARS + 1
        if size < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
        hashes = np.zeros(size, np.uint64)
        for place, factor in enumerate(FACTORS):
            hashes += self.characters[place : place + size] * factor
        within = np.flatnonzero(self.row_of[:size] == self.row_of[CHARS - 1 :])
        return hashes[within], self.row_of[within], within

    def texts(self) -> Hashes:
        """The hash of each text, whole."""
        starts = np.searchsorted(self.row_of, np.arange(self.row_of[-1] + 1))
        place = np.arange(len(self.row_of)) - starts[self.row_of]
        values = (self.characters + np.uint64(1)) * _powers(int(place.max()) + 1)[place]
        return mixed(np.add.reduceat(values, starts))

    def words(self) -> "Words":
        """The words, and where each begins and ends."""
        points, row_of = self.characters, self.row_of
        is_word = points != SPACE
        alone = np.zeros(len(points), bool)
        for first, last in UNSPACED if points.max() >= UNSPACED[0][0] else ():
            alone |= (points >= first) & (points <= last)
        begins = is_word.copy()
        begins[1:] &= (points[:-1] == SPACE) | alone[1:] | alone[:-1] | (row_of[1:] != row_of[:-1])
        starts = np.flatnonzero(begins)
        if not len(starts):
            return Words(np.zeros(0, np.uint64), row_of[:0], np.zeros(len(points), np.int64), is_word)
        word_of = np.cumsum(begins) - 1
        place = np.arange(len(points)) - starts[word_of.clip(min=0)]
        powers = _powers(int(place.max()) + 1)
        # A space adds nothing, and neither does what stands before the first word.
        values = np.where(is_word, (points + np.uint64(1)) * powers[place.clip(min=0)], np.uint64(0))
        return Words(mixed(np.add.reduceat(values, starts)), row_of[starts], word_of, is_word)


@dataclass(frozen=True)
class Words:
    """The words of a batch."""

    hashes: Hashes
    row_of: Rows
    word_of: npt.NDArray[np.int64]
    """Of each character, the word that it is of or stands behind."""
    is_word: Marks
    """Of each character, whether it is of a word."""

    def runs(self) -> tuple[Hashes, Rows]:
        """The hash, and the first word, of every eight words in a row."""
        size = len(self.hashes) - WORDS + 1
        if size < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes = np.zeros(size, np.uint64)
        for place, factor in enumerate(_powers(WORDS)):
            hashes += self.hashes[place : place + size] * factor
        within = np.flatnonzero(self.row_of[:size] == self.row_of[WORDS - 1 :])
        return mixed(hashes[within]), within

    def outside(self, shared: Hashes) -> Marks:
        """Of each character, whether it is of a word that no run in `shared` covers."""
        hashes, first = self.runs()
        found = first[is_in(hashes, shared)]
        if not len(found):
            return self.is_word
        depth = np.zeros(len(self.hashes) + 1, np.int64)
        np.add.at(depth, found, 1)
        np.add.at(depth, found + WORDS, -1)
        return self.is_word & (np.cumsum(depth[:-1]) == 0)[self.word_of.clip(min=0)]


def mixed(hashes: Hashes) -> Hashes:
    """The same numbers with every bit depending on all of them: the finalizer of SplitMix64."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def is_in(hashes: Hashes, known: Hashes) -> Marks:
    """Of each, whether it is among the sorted ones."""
    if len(hashes) > len(known) > 0:  # a table of the known ones is worth its making
        found = pc.is_in(pa.array(hashes), value_set=pa.array(known))
        return np.asarray(found.to_numpy(zero_copy_only=False), bool)
    if not len(known):
        return np.zeros(len(hashes), bool)
    return known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes


class Seen:
    """Hashes that have come before, in 8 bytes each."""

    def __init__(self) -> None:
        self._known = np.zeros(0, np.uint64)
        self._lately: set[int] = set()

    def are_new(self, hashes: Hashes) -> Marks:
        """Of each, whether it is the first of its kind."""
        is_new = ~is_in(hashes, self._known)
        for place in np.flatnonzero(is_new).tolist():
            value = int(hashes[place])
            is_new[place] = value not in self._lately
            self._lately.add(value)
        if len(self._lately) >= max(KEPT_LATELY, len(self._known) // 8):
            self._known = np.union1d(self._known, np.fromiter(self._lately, np.uint64, len(self._lately)))
            self._lately = set()
        return is_new


def frequent(batches: Callable[[], Iterable[tuple[Hashes, Rows]]], *, more_than: float) -> Hashes:
    """What is in more than so many texts, sorted. `batches` is called twice and must give the same both times.

    Exact, in memory that does not grow with the number of hashes: a coarse count first, which is never too low, and
    then a count of those alone that pass it.
    """
    coarse = np.zeros(CELLS, np.uint32)
    for hashes, _ in batches():
        cells, how_often = np.unique(_cell(hashes), return_counts=True)  # in order, so that memory is, too
        coarse[cells] += how_often.astype(np.uint32)
    if not (coarse > more_than).any():
        return np.zeros(0, np.uint64)
    pending: list[Hashes] = []
    seen, counts, size = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0
    for hashes, rows in batches():
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
    """The hashes of all texts, without those that repeat one of the same text."""
    order = np.argsort(hashes, kind="stable")  # each hash's rows are ascending as they came
    hashes, rows = hashes[order], rows[order]
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[is_first]


def _cell(hashes: Hashes) -> npt.NDArray[np.uint32]:
    return (mixed(hashes) % np.uint64(CELLS)).astype(np.uint32)


def _powers(count: int) -> Hashes:
    powers = np.full(count, BASE, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def in_batches(texts: Iterable[str], *, max_texts: int = 512, max_chars: int = 2**16) -> Iterator[list[str]]:
    """The texts as `said` gives them, so many at a time that a batch stays small."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(said(text))
        chars += len(batch[-1])
        if len(batch) == max_texts or chars >= max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
