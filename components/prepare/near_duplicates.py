"""Find near-duplicate prompts, between training and held-out records and within training; pure.

Two prompts are near-duplicates if the Jaccard similarity of their shingles reaches the threshold twice: for the whole
texts, and for their own texts. Shingles are the sets of five consecutive characters, without case, punctuation and
white space. A prompt's own text is the prompt without shared text. Shared text is every run of eight words that occurs
in more than ten different prompts, such as a task's instruction, a document with many questions, or a form letter.

So a common instruction does not make two messages near, nor a common page two questions. The same question about two
pages is not near either, because the whole texts differ. Prompts with the same words are always near-duplicates.

The bound of ten is from GPT-3 (arXiv:2005.14165, appendix C), whose authors took an overlap with more than ten
documents for boilerplate and not for a leak. A page with ten questions or fewer is therefore not shared text, and its
questions are near if the page is most of each prompt: data.group keeps them together.

Shingles that occur in more than a twentieth of the held-out prompts are ignored, so that a common short phrase, of
fewer than eight words, does not count as similarity.

`minhash` finds the candidates, and the exact sets decide. The cost is linear in the number of prompts; texts are read
in batches, and what is kept of each is on disk.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.prepare.minhash import Band, MinHash, Minima, Numbers, Signatures
from components.prepare.shingles import CHARS, Batch, Hashes, Known, Marks, Rows, frequent, in_batches
from components.prepare.signed import Signed

COMMON, COMMON_AT_LEAST = 0.05, 3
"""A shingle in more than this share of the held-out prompts, and in more than this number of them, is ignored."""
SHARED, SHARED_AT_LEAST = 0.01, 10
"""A run of words in more than this share of all prompts, and in more than this number of different ones, is shared."""
ROUNDING = 1e-9
MOST_IN_BAND, MOST_COMPARED = 64, 16
"""At most how many held-out prompts one band may propose, and how many of all proposals, the most similar first, are
compared exactly. It bounds the work where many prompts are alike, of which any one may stand for the others."""
AT_ONCE = 4096
KEPT_BYTES = 2**27
"""Bound on the cache of shingle sets that the next comparison may need."""
AHEAD = 64
"""Texts whose shingles are made in one batch."""
LOOKED_UP = 2**20
"""Hashes that are looked up in one batch."""


class _ShingleSets(NamedTuple):
    """Shingles of one text, the whole and its own part: each hash once, sorted."""

    whole: Hashes
    own: Hashes

    @property
    def nbytes(self) -> int:
        """Bytes of both sets."""
        return self.whole.nbytes + self.own.nbytes


class _Shingled(NamedTuple):
    """The shingles of a batch of texts."""

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
        self._similarity = similarity
        self._minhash = MinHash(similarity)
        self._signed = Signed(folder, "prompts")
        """Signatures of the prompts that were compared with the held-out ones."""
        self._signed_held_out = Signed(folder, "held_out")
        most = max(COMMON_AT_LEAST, COMMON * len(held_out))
        shingles = (hashes for hashes, _ in _shingles_in(held_out))
        self._common = Known(frequent(shingles, lambda: _shingles_in(held_out), more_than=most))
        most = max(SHARED_AT_LEAST, SHARED * (len(prompts) + len(held_out)))
        runs = _Runs(held_out, prompts)
        self._shared = Known(frequent(runs.of_all(), runs.of_different, more_than=most))
        for batch in _batched(held_out):
            self._signed_held_out.add(*self._signatures(batch))

    def near_held_out(self, prompts: Iterable[str]) -> Iterator[int | None]:
        """For each prompt, in order, the index of a held-out prompt that it is near to, if any. Lazy, in batches."""
        theirs = self._signed_held_out
        every = np.ones(len(self._held_out), bool)
        bands = [Band(*theirs.in_band(band, every)) for band in range(self._minhash.bands)]
        known, first = np.unique(theirs.equals, return_index=True)
        sets = _Sets(self, self._held_out)
        for batch in _batched(prompts):
            ours, equals = self._signatures(batch)
            self._signed.add(ours, equals)
            places = np.searchsorted(known, equals).clip(max=len(known) - 1)
            is_equal = known[places] == equals
            found = [row if each else None for row, each in zip(first[places].tolist(), is_equal.tolist(), strict=True)]
            open_rows = np.flatnonzero(ours.is_found & ~is_equal)
            own_sets, candidates = _Sets(self, batch), self._candidates(ours, open_rows, bands)
            while some := list(islice(candidates, AHEAD)):
                own_sets.make(row for row, _ in some)
                sets.make(others[0] for _, others in some)
                for row, others in some:
                    found[row] = next((each for each in others if self._are_near(own_sets[row], sets[each])), None)
            yield from found

    def repeats(self, prompts: Sequence[str], kept: Marks) -> int:
        """How many of the prompts marked in `kept` are near an earlier marked one. `prompts` are the ones that
        `near_held_out` has read, and perhaps more, which are not marked.

        Within a band each prompt is compared with the first and with the previous one, not with all.
        """
        size = len(self._signed)
        kept, is_repeat = kept[:size], np.zeros(size, bool)
        is_repeat[kept] = _came_before(self._signed.equals[kept])
        sets, known = _Sets(self, prompts), np.zeros(0, np.int64)
        for band in range(self._minhash.bands):
            pairs = np.setdiff1d(_neighbours(*self._signed.in_band(band, kept), size=size), known, assume_unique=True)
            rows, others = np.divmod(pairs[~is_repeat[pairs // size]], size)
            likely = self._minhash.likely(self._signed, rows, self._signed, others) >= 0
            pending, compared = zip(rows[likely].tolist(), others[likely].tolist(), strict=True), []
            while some := list(islice(pending, AHEAD)):
                sets.make(chain.from_iterable(pair for pair in some if not is_repeat[pair[0]]))
                for row, other in some:
                    if not is_repeat[row]:
                        is_repeat[row] = self._are_near(sets[row], sets[other])
                        compared.append(row * size + other)
            known = np.union1d(known, np.array(compared, np.int64))
        return int(np.count_nonzero(is_repeat))

    def shingle_sets(self, texts: Iterable[str]) -> Iterator[_ShingleSets]:
        """The two sets of each text."""
        for found in self._shingled(texts):
            starts = np.searchsorted(found.rows, np.arange(len(found.equals) + 1)).tolist()
            for part in map(slice, starts[:-1], starts[1:]):
                hashes, is_whole, is_own = found.hashes[part], found.is_whole[part], found.is_own[part]
                whole = np.unique(hashes[is_whole])
                yield _ShingleSets(whole, whole if (is_own == is_whole).all() else np.unique(hashes[is_own]))

    def _are_near(self, one: _ShingleSets, other: _ShingleSets) -> bool:
        least = self._similarity - ROUNDING
        if _jaccard(one.own, other.own) < least:
            return False
        return (one.own is one.whole and other.own is other.whole) or _jaccard(one.whole, other.whole) >= least

    def _shingled(self, texts: Iterable[str]) -> Iterator[_Shingled]:
        for some in in_batches(texts):
            batch = Batch.of(some)
            hashes, is_whole = batch.shingles()
            if len(self._common):
                is_whole &= ~self._common.has(hashes)
            outside = batch.words().outside(self._shared, batch) if len(self._shared) else batch.is_word
            is_own = np.zeros(len(hashes), bool)
            for place in range(CHARS):
                is_own |= outside[place : place + len(hashes)]
            yield _Shingled(hashes, batch.row_of[: len(hashes)], is_whole, is_own & is_whole, batch.texts())

    def _signatures(self, texts: Sequence[str]) -> tuple[Signatures, Hashes]:
        equals: list[Hashes] = []

        def parts() -> Iterator[Signatures]:
            for found in self._shingled(texts):
                equals.append(found.equals)
                marks = (found.is_whole, found.is_own)
                yield self._minhash.signatures(found.hashes, found.rows, *marks, texts=len(found.equals))

        return Signatures.joined(parts(), texts=len(texts)), np.concatenate(equals)

    def _candidates(self, ours: Signatures, rows: Numbers, bands: Sequence[Band]) -> Iterator[tuple[int, list[int]]]:
        """For each row that has any, the held-out texts to compare it with, the most similar first."""
        found = [np.zeros((2, 0), np.int64)]
        for band, hashes in zip(bands, ours.bands, strict=True):
            found.append(np.stack(band.with_hash(hashes[rows], most=MOST_IN_BAND)))
        places, others = np.concatenate(found, axis=1)
        pairs = np.unique(rows[places] * len(self._held_out) + others)
        rows, others = np.divmod(pairs, len(self._held_out))
        likely = self._minhash.likely(ours, rows, self._signed_held_out, others)
        order = np.lexsort((others, -likely, rows))
        order = order[likely[order] >= 0]
        sorted_pairs = zip(rows[order].tolist(), others[order].tolist(), strict=True)
        for row, group in groupby(sorted_pairs, key=lambda pair: pair[0]):
            yield row, [other for _, other in islice(group, MOST_COMPARED)]


class _Sets:
    """The sets of some texts, made on first use. A cache keeps the most recent ones."""

    def __init__(self, comparison: Comparison, texts: Sequence[str]) -> None:
        self._comparison = comparison
        self._texts = texts
        self._kept: OrderedDict[int, _ShingleSets] = OrderedDict()
        self._bytes = 0

    def make(self, rows: Iterable[int]) -> None:
        """Make the sets of these texts in one batch, which is faster than one by one."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        for row, found in zip(missing, self._comparison.shingle_sets(self._texts[row] for row in missing), strict=True):
            self._kept[row] = found
            self._bytes += found.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def __getitem__(self, row: int) -> _ShingleSets:
        self.make([row])
        return self._kept[row]


class _Runs:
    """The runs of eight words in some texts, which are read twice."""

    def __init__(self, *parts: Iterable[str]) -> None:
        self._parts = parts
        self._equals = [np.zeros(0, np.uint64)]
        """For each text, one hash of all of it."""

    def of_all(self) -> Iterator[Hashes]:
        """Yield the runs' hashes, a batch of texts at a time."""
        for batch in self._batches():
            self._equals.append(batch.texts())
            yield batch.words().runs()[0]

    def of_different(self) -> Iterator[tuple[Hashes, Rows]]:
        """Yield the runs' hashes and the rows of their texts, without repeated texts. Call it after `of_all`."""
        equals = np.concatenate(self._equals)
        is_new = np.zeros(len(equals), bool)
        is_new[np.unique(equals, return_index=True)[1]] = True
        start = 0
        for batch in self._batches():
            words = batch.words()
            hashes, first = words.runs()
            rows = words.row_of(first)
            of_new = is_new[start + rows]
            start += len(batch.ends)
            yield hashes[of_new], rows[of_new]

    def _batches(self) -> Iterator[Batch]:
        for part in self._parts:
            yield from map(Batch.of, in_batches(part))


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    pending = iter(texts)
    while batch := list(islice(pending, AT_ONCE)):
        yield batch


def _shingles_in(texts: Iterable[str]) -> Iterator[tuple[Hashes, Rows]]:
    for batch in map(Batch.of, in_batches(texts)):
        hashes, is_one = batch.shingles()
        yield hashes[is_one], batch.row_of[: len(hashes)][is_one]


def _came_before(hashes: Hashes) -> Marks:
    """For each hash, whether an earlier one is equal. Most hashes are unique, so their positions are not sorted."""
    in_order = np.sort(hashes)
    several = Known(np.unique(in_order[1:][in_order[1:] == in_order[:-1]]))
    del in_order
    parts = [several.has(hashes[start : start + LOOKED_UP]) for start in range(0, len(hashes), LOOKED_UP)]
    found = np.concatenate([np.zeros(0, bool), *parts])
    places = np.flatnonzero(found)
    found[places[np.unique(hashes[places], return_index=True)[1]]] = False
    return found


def _neighbours(keys: Minima, rows: Numbers, *, size: int) -> Numbers:
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
