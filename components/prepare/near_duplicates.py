"""Which prompts say nearly the same as another, between training and what is held out and within training; pure.

Two prompts are near when they are as similar as asked **in whole and in what each says of its own**. Similarity is
Jaccard's, of the sets of five characters in a row, without case, punctuation and white space. Of its own a prompt says
what is no shared text, and shared text is every run of eight words that stands in more than ten different prompts: a
task's instruction, a document with its many questions, a form letter. So instructions before many messages make no two
messages near, and no question is near another because both are on the same page. A question that is asked of several
pages is not near itself, because in whole the pages differ. Prompts that are the same word for word are always near.

The bound is that of GPT-3's authors, to whom what overlaps with more than ten documents was boilerplate and no leak
(arXiv:2005.14165, appendix C). A page with ten questions or fewer is no shared text, and its questions are near where
it is most of what they say: data.group keeps them together.

Five characters that stand in more than a twentieth of the held-out prompts count in neither set, so that a short form,
of fewer than eight words, is no similarity where many prompts have it.

Candidates come from `minhash`, and each decision from the exact sets. The cost grows with the number of prompts and
not with its square, and texts are read in batches.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from components.prepare.minhash import MinHash, Numbers, Signatures
from components.prepare.shingles import CHARS, Batch, Hashes, Marks, Rows, Seen, frequent, in_batches, is_in

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
    is_own: Marks
    """Of each, whether it reaches into what no shared text covers."""
    equals: Hashes
    """Of each text the hash of all of it."""


class Comparison:
    """How near prompts of one corpus are: it learns what is shared among `prompts` and `held_out` together."""

    def __init__(self, prompts: Sequence[str], held_out: Sequence[str], *, similarity: float) -> None:
        """`similarity` is above 0 and at most 1. The texts are kept, and not copied."""
        self._held_out = held_out
        self._similarity = similarity
        self._minhash = MinHash(similarity)
        self._signed: list[tuple[Signatures, Hashes]] = []
        """Of the prompts that were compared with what is held out."""
        most = max(COMMON_AT_LEAST, COMMON * len(held_out))
        self._common = frequent(lambda: _shingles_in(held_out), more_than=most)
        self._shared = frequent(
            lambda: _runs_in(held_out, prompts), more_than=max(SHARED_AT_LEAST, SHARED * (len(prompts) + len(held_out)))
        )

    def near_held_out(self, prompts: Iterable[str]) -> Iterator[int | None]:
        """For each prompt, in order, the held-out one that it is near to, if any; lazy, some thousand at a time."""
        theirs, equals = self._signatures(self._held_out)
        bands = [theirs.in_band(band) for band in range(self._minhash.bands)]
        place_of = {value: row for row, value in reversed(list(enumerate(equals.tolist())))}
        sets = _Sets(self, self._held_out)
        pending = iter(prompts)
        while batch := list(islice(pending, AT_ONCE)):
            ours, equals = self._signatures(batch)
            self._signed.append((ours, equals))
            found = [place_of.get(value) for value in equals.tolist()]
            open_rows = np.flatnonzero(ours.is_found & np.array([each is None for each in found]))
            for row, candidates in self._candidates(ours, open_rows, theirs, bands):
                said = self.said(batch[row])
                found[row] = next((each for each in candidates if self._are_near(said, sets[each])), None)
            yield from found

    def repeats(self, prompts: Sequence[str], kept: Marks | None = None) -> int:
        """How many of the prompts are near an earlier one; `kept` marks which they are of those that
        `near_held_out` has gone through, whose signatures are then used, once.

        Of those that share a band each is compared with the first and with the one before it, not with all.
        """
        ours, equals = self._signatures(prompts) if kept is None else self._signed_where(kept)
        is_repeat = np.ones(len(prompts), bool)
        is_repeat[np.unique(equals, return_index=True)[1]] = False
        sets, known = _Sets(self, prompts), np.zeros(0, np.int64)
        for band in range(self._minhash.bands):
            pairs = np.setdiff1d(_neighbours(*ours.in_band(band), size=len(prompts)), known, assume_unique=True)
            rows, others = np.divmod(pairs[~is_repeat[pairs // len(prompts)]], len(prompts))
            likely = self._minhash.likely(ours, rows, ours, others) >= 0
            compared = []
            for row, other in zip(rows[likely].tolist(), others[likely].tolist(), strict=True):
                if not is_repeat[row]:
                    is_repeat[row] = self._are_near(sets[row], sets[other])
                    compared.append(row * len(prompts) + other)
            known = np.union1d(known, np.array(compared, np.int64))
        return int(np.count_nonzero(is_repeat))

    def said(self, text: str) -> _Said:
        """The sets that the text is compared by."""
        (found,) = self._shingled([text])
        return _Said(np.unique(found.hashes), np.unique(found.hashes[found.is_own]))

    def _are_near(self, one: _Said, other: _Said) -> bool:
        least = self._similarity - ROUNDING
        return _jaccard(one.own, other.own) >= least and _jaccard(one.whole, other.whole) >= least

    def _shingled(self, texts: Iterable[str]) -> Iterator[_Shingled]:
        for said in in_batches(texts):
            batch = Batch.of(said)
            hashes, rows, first = batch.shingles()
            own_before = np.concatenate([[0], np.cumsum(batch.words().outside(self._shared))])
            kept = ~is_in(hashes, self._common)
            is_own = own_before[first + CHARS] > own_before[first]
            yield _Shingled(hashes[kept], rows[kept], is_own[kept], batch.texts())

    def _signatures(self, texts: Sequence[str]) -> tuple[Signatures, Hashes]:
        equals: list[Hashes] = []

        def parts() -> Iterator[Signatures]:
            for found in self._shingled(texts):
                equals.append(found.equals)
                yield self._minhash.signatures(found.hashes, found.rows, found.is_own, texts=len(found.equals))

        return Signatures.joined(parts(), texts=len(texts)), np.concatenate(equals)

    def _signed_where(self, kept: Marks) -> tuple[Signatures, Hashes]:
        equals: list[Hashes] = []

        def parts() -> Iterator[Signatures]:
            start = 0
            for signatures, hashes in iter(lambda: self._signed.pop(0) if self._signed else None, None):
                marks = kept[start : start + len(hashes)]
                start += len(hashes)
                equals.append(hashes[marks])
                yield signatures.where(marks)

        return Signatures.joined(parts(), texts=int(np.count_nonzero(kept))), np.concatenate(equals)

    def _candidates(
        self,
        ours: Signatures,
        rows: Numbers,
        theirs: Signatures,
        bands: Sequence[tuple[npt.NDArray[np.uint32], Numbers]],
    ) -> Iterator[tuple[int, list[int]]]:
        """Of each row that has any, whom to compare it with, the most similar first."""
        pairs = [np.zeros((0, 2), np.int64)]
        for band, (keys, others) in enumerate(bands):
            begin = np.searchsorted(keys, ours.bands[rows, band], "left")
            found = np.minimum(np.searchsorted(keys, ours.bands[rows, band], "right") - begin, MOST_IN_BAND)
            offsets = np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
            pairs.append(np.stack([np.repeat(rows, found), others[np.repeat(begin, found) + offsets]], axis=1))
        candidates = np.unique(np.concatenate(pairs), axis=0)
        likely = self._minhash.likely(ours, candidates[:, 0], theirs, candidates[:, 1])
        order = np.lexsort((candidates[:, 1], -likely, candidates[:, 0]))
        sorted_pairs = candidates[order[likely[order] >= 0]].tolist()
        for row, group in groupby(sorted_pairs, key=lambda pair: pair[0]):
            yield row, [other for _, other in islice(group, MOST_COMPARED)]


class _Sets:
    """The sets of some texts, made when they are first asked for; those that were made last are kept."""

    def __init__(self, comparison: Comparison, texts: Sequence[str]) -> None:
        self._comparison = comparison
        self._texts = texts
        self._kept: OrderedDict[int, _Said] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, row: int) -> _Said:
        if row not in self._kept:
            said = self._kept[row] = self._comparison.said(self._texts[row])
            self._bytes += said.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return self._kept[row]


def _shingles_in(texts: Iterable[str]) -> Iterator[tuple[Hashes, Rows]]:
    for said in in_batches(texts):
        hashes, rows, _ = Batch.of(said).shingles()
        yield hashes, rows


def _runs_in(*parts: Iterable[str]) -> Iterator[tuple[Hashes, Rows]]:
    """The runs of words of each different text."""
    seen = Seen()
    for part in parts:
        for said in in_batches(part):
            batch = Batch.of(said)
            is_new = seen.are_new(batch.texts())
            words = batch.words()
            hashes, first = words.runs()
            rows = words.row_of[first]
            yield hashes[is_new[rows]], rows[is_new[rows]]


def _neighbours(keys: npt.NDArray[np.uint32], rows: Numbers, *, size: int) -> Numbers:
    """Of each row, in order of the keys, the first with its key and the one before it: pairs as row * size + other."""
    starts = np.searchsorted(keys, keys)
    places = np.arange(len(keys))
    pairs = [(rows * size + rows[others])[others < places] for others in (starts, np.maximum(places - 1, starts))]
    return np.unique(np.concatenate(pairs))


def _jaccard(one: Hashes, other: Hashes) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - both
    return both / either if either else 0.0
