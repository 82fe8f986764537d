import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from components.prepare.near_duplicates import EMPTY, Band, Hashes, MinHash, Signatures, Signed, lenders_of, minima_of


def rows_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def test_each_bin_holds_its_smallest_number_or_what_the_first_lender_with_any_holds() -> None:
    """By the definition, a bin and a hash at a time."""
    rng, bins = random.Random(0), 24
    texts = [[rng.getrandbits(64) for _ in range(size)] for size in (0, 1, 2, 5, 24, 100, 1, 1000, 0)]
    marks = [[rng.random() < 0.8 for _ in text] for text in texts]
    expected = []
    for text, marked in zip(texts, marks, strict=True):
        numbers = defaultdict(list)
        for value, is_in in zip(text, marked, strict=True):
            if is_in:
                numbers[(value // 2**32) * bins // 2**32].append(value % 2**32)
        own = {each: min(found) for each, found in numbers.items()}
        lent = [[own[other] for other in lenders_of(bins)[:, each].tolist() if other in own] for each in range(bins)]
        expected.append([own.get(each, lent[each][0] if own else int(EMPTY)) for each in range(bins)])
    found = minima_of(
        np.array([value for text in texts for value in text], np.uint64),
        rows_of([len(text) for text in texts]),
        np.array([is_in for marked in marks for is_in in marked]),
        texts=len(texts),
        bins=bins,
    )
    assert found.T.tolist() == expected


def test_each_bin_asks_every_other_in_an_order_of_its_own() -> None:
    orders = lenders_of(72).T.tolist()
    assert all(sorted(order) == list(range(72)) for order in orders)
    assert len(set(map(tuple, orders))) == 72
    first = [order[0] for order in orders]
    assert max(map(first.count, first)) < 8


def pairs(both: int, ours: int, theirs: int, *, count: int) -> tuple[Hashes, np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of so many pairs of sets, whose pair each is of, and of which of the two sets."""
    size = both + ours + theirs
    hashes = np.random.default_rng(size).integers(0, 2**64, size * count, np.uint64)
    place = np.tile(np.arange(size), count)
    return hashes, rows_of([size] * count), place < both + ours, (place < both) | (place >= both + ours)


@pytest.mark.parametrize(("both", "ours", "theirs"), [(1, 0, 1), (4, 1, 0), (8, 1, 1), (30, 15, 15), (900, 50, 50)])
def test_two_sets_agree_in_as_many_minima_as_they_are_similar(both: int, ours: int, theirs: int) -> None:
    """Within four standard errors over 3,000 pairs, which are independent of each other."""
    hashes, rows, in_one, in_other = pairs(both, ours, theirs, count=3000)
    one, other = (minima_of(hashes, rows, is_in, texts=3000, bins=72) for is_in in (in_one, in_other))
    agreeing = (one == other).mean(axis=0)
    similarity = both / (both + ours + theirs)
    assert abs(agreeing.mean() - similarity) < 4 * agreeing.std() / 3000**0.5


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("size", [10, 20, 70, 500])
def test_pairs_of_just_the_similarity_are_found_however_small_the_sets(
    size: int, similarity: float, tmp_path: Path
) -> None:
    count = 4000
    hashes, rows, in_one, in_other = pairs(round(size * similarity), size - round(size * similarity), 0, count=count)
    minhash = MinHash(similarity)
    ours, theirs = (minhash.signatures(hashes, rows, is_in, is_in, texts=count) for is_in in (in_one, in_other))
    is_found, signed = np.zeros(count, bool), Signed(tmp_path, "theirs")
    signed.add(theirs, np.zeros(count, np.uint64))
    for band, keys in enumerate(ours.bands):
        places, texts = Band(*signed.in_band(band, np.ones(count, bool))).with_hash(keys, most=64)
        is_found[places[places == texts]] = True
    likely = minhash.likely(ours.minima.__getitem__, np.arange(count), signed.minima_at, np.arange(count)) >= 0
    assert np.count_nonzero(~(is_found & likely)) <= 0.001 * count


def test_sets_that_have_little_in_common_seldom_share_a_band() -> None:
    hashes, rows, in_one, in_other = pairs(30, 35, 35, count=4000)
    minhash = MinHash(0.8)
    ours, theirs = (minhash.signatures(hashes, rows, is_in, is_in, texts=4000) for is_in in (in_one, in_other))
    assert (ours.bands == theirs.bands).any(axis=0).mean() < 24 * 0.3**5 * 2
    own_differs = minhash.signatures(hashes, rows, in_one, in_other & ~in_one, texts=4000)
    assert not (ours.bands == own_differs.bands).any()


@pytest.mark.parametrize("texts", [0, 1, 3000])
def test_a_band_finds_every_text_with_the_hash_and_no_other(texts: int, tmp_path: Path) -> None:
    """However many parts they come in."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**32, (2, texts), np.uint32) // 2**22 * 2**22
    hashes[:, ::3] = rng.integers(0, 2**32, hashes[:, ::3].shape, np.uint32)
    is_found, kept = rng.random(texts) < 0.9, rng.random(texts) < 0.9
    signed = Signed(tmp_path, "some")
    for part in (slice(0, 1), slice(1, 700), slice(700, texts)):
        size = len(is_found[part])
        minima = np.arange(2 * texts, dtype=np.uint8).reshape(texts, 2)[part]
        signed.add(Signatures(hashes[:, part], minima, is_found[part]), np.zeros(size, np.uint64))
    if texts > 1:
        assert signed.minima_at(np.array([texts - 1, 0])).tolist() == [
            [(2 * texts - 2) % 256, (2 * texts - 1) % 256],
            [0, 1],
        ]
    band = Band(*signed.in_band(1, kept))
    asked = np.concatenate([hashes[1, ::2], rng.integers(0, 2**32, 500, np.uint32)])
    for most in (1, 3, 10**6):
        found = list(zip(*(each.tolist() for each in band.with_hash(asked, most=most)), strict=True))
        assert found == [
            (place, text)
            for place, value in enumerate(asked.tolist())
            for text in np.flatnonzero((hashes[1] == value) & is_found & kept)[:most].tolist()
        ]
