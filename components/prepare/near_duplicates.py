"""Which prompts say nearly the same as another, between training and what is held out and within training; pure.

Two prompts are near when they are as similar as asked **in whole and in what each says of its own**. Similarity is
Jaccard's, of the sets of five characters in a row, without case, punctuation and white space. Of its own a prompt says
what is no shared text, and shared text is every run of eight words that stands in more than ten different prompts: a
task's instruction, a document with its many questions, a form letter. So instructions before many messages make no two
messages near, and no question is near another because both are on the same page. A question that is asked of several
pages is not near itself, because in whole the pages differ. Prompts that are the same word for word are always near.

The bound is that of GPT-3's authors, who took what overlaps with more than ten documents for boilerplate and no leak
(arXiv:2005.14165, appendix C). A page with ten questions or fewer is no shared text, and its questions are near where
it is most of what they say: data.group keeps them together.

Five characters that stand in more than a twentieth of the held-out prompts count in neither set, so that a short form,
of fewer than eight words, is no similarity where many prompts have it.

Candidates come from `minhash`, and each decision from the exact sets. The cost grows with the number of prompts and
not with its square; texts are read in batches, and what is kept of each lies on disk.
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
"""What is in more than this share of the held-out prompts, and in more than so many, is no similarity."""
SHARED, SHARED_AT_LEAST = 0.01, 10
"""A run of words in more than this share of all prompts, and in more than so many different ones, is shared text."""
ROUNDING = 1e-9
MOST_IN_BAND, MOST_COMPARED = 64, 16
"""Of the held-out prompts that a band finds so many are looked at, and of those that all bands find the most similar so
many are compared: a bound to the work on prompts that are all alike, of which any may stand for the others."""
AT_ONCE = 4096
KEPT_BYTES = 2**27
"""Of sets of shingles that are kept for the next comparison."""
AHEAD = 64
"""Texts whose sets are made together."""
LOOKED_UP = 2**20
"""Hashes that are looked up at once."""


class _Said(NamedTuple):
    """What one text says, and of that what it says of its own: each hash once, sorted."""

    whole: Hashes
    own: Hashes

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.whole.nbytes + self.own.nbytes


class _Shingled(NamedTuple):
    """The shingles of a batch of texts."""

    hashes: Hashes
    rows: Rows
    is_whole: Marks
    """Of each, whether it is a shingle that counts."""
    is_own: Marks
    """Of each, whether it also reaches into what no shared text covers."""
    equals: Hashes
    """Of each text the hash of all of it."""


class Comparison:
    """How near prompts of one corpus are: it learns what is shared among `prompts` and `held_out` together."""

    def __init__(self, prompts: Sequence[str], held_out: Sequence[str], *, similarity: float, folder: Path) -> None:
        """`similarity` is above 0 and at most 1. The texts are kept, and not copied; their signatures lie in files in
        `folder`, which are the caller's to remove."""
        self._held_out = held_out
        self._similarity = similarity
        self._minhash = MinHash(similarity)
        self._signed = Signed(folder, "prompts")
        """Of the prompts that were compared with what is held out."""
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
        """For each prompt, in order, the held-out one that it is near to, if any; lazy, some thousand at a time."""
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
        """How many of the marked prompts are near an earlier one of them. `prompts` are those that `near_held_out` has
        gone through, and perhaps more, which are not marked.

        Of those that share a band each is compared with the first and with the one before it, not with all.
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

    def said(self, texts: Iterable[str]) -> Iterator[_Said]:
        """The sets that each of the texts is compared by."""
        for found in self._shingled(texts):
            starts = np.searchsorted(found.rows, np.arange(len(found.equals) + 1)).tolist()
            for part in map(slice, starts[:-1], starts[1:]):
                hashes, is_whole, is_own = found.hashes[part], found.is_whole[part], found.is_own[part]
                whole = np.unique(hashes[is_whole])
                yield _Said(whole, whole if (is_own == is_whole).all() else np.unique(hashes[is_own]))

    def _are_near(self, one: _Said, other: _Said) -> bool:
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
        """Of each row that has any, the held-out texts to compare it with, the most similar first."""
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
    """The sets of some texts, made when they are first asked for; those that were made last are kept."""

    def __init__(self, comparison: Comparison, texts: Sequence[str]) -> None:
        self._comparison = comparison
        self._texts = texts
        self._kept: OrderedDict[int, _Said] = OrderedDict()
        self._bytes = 0

    def make(self, rows: Iterable[int]) -> None:
        """Those of these texts together, which takes less time than one by one."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        for row, said in zip(missing, self._comparison.said(self._texts[row] for row in missing), strict=True):
            self._kept[row] = said
            self._bytes += said.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def __getitem__(self, row: int) -> _Said:
        self.make([row])
        return self._kept[row]


class _Runs:
    """The runs of words of some texts, which are gone through twice."""

    def __init__(self, *parts: Iterable[str]) -> None:
        self._parts = parts
        self._equals = [np.zeros(0, np.uint64)]
        """Of each text the hash of all of it."""

    def of_all(self) -> Iterator[Hashes]:
        """Those of each text."""
        for batch in self._batches():
            self._equals.append(batch.texts())
            yield batch.words().runs()[0]

    def of_different(self) -> Iterator[tuple[Hashes, Rows]]:
        """And whose they are, without those of a text that has come before; to be called after `of_all`."""
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
    """Of each whether an earlier one is the same. Most stand alone, and are sorted without their places."""
    in_order = np.sort(hashes)
    several = Known(np.unique(in_order[1:][in_order[1:] == in_order[:-1]]))
    del in_order
    parts = [several.has(hashes[start : start + LOOKED_UP]) for start in range(0, len(hashes), LOOKED_UP)]
    found = np.concatenate([np.zeros(0, bool), *parts])
    places = np.flatnonzero(found)
    found[places[np.unique(hashes[places], return_index=True)[1]]] = False
    return found


def _neighbours(keys: Minima, rows: Numbers, *, size: int) -> Numbers:
    """Of each row, in order of the keys, the first with its key and the one before it: pairs as row * size + other."""
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    starts, places = np.flatnonzero(begins), np.flatnonzero(~begins)
    first = starts[np.searchsorted(starts, places) - 1]
    return np.unique(np.concatenate([rows[places] * size + rows[others] for others in (first, places - 1)]))


def _jaccard(one: Hashes, other: Hashes) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 0.0
