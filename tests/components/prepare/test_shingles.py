import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from components.prepare import near_duplicates
from components.prepare.near_duplicates import Batch, Known, frequent, in_batches, mixed


def said(texts: list[str]) -> list[str]:
    """What a batch holds of each text."""
    batch = Batch.of(texts)
    points = batch.characters.tolist()
    return ["".join(map(chr, points[start:end])) for start, end in zip([0, *batch.ends], batch.ends, strict=False)]


def words_of(text: str) -> list[str]:
    """The words as the hashes have them."""
    batch = Batch.of([text])
    (points,) = said([text])
    first = batch.words().first.tolist()
    return [points[start:end].strip() for start, end in pairwise([*first, len(points)])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Stye, left EYE!", ["stye", "left", "eye"]),
        ("a", ["a"]),
        ("...", []),
        ("", []),
        ("请问 Mpox是什么", ["请", "问", "mpox", "是", "什", "么"]),
        ("สวัสดี abc", [*"สวสด", "abc"]),
        ("안녕 세상", ["안녕", "세상"]),
    ],
)
def test_words_are_what_stands_between_spaces_and_characters_where_scripts_have_none(
    text: str, words: list[str]
) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    "alphabet", ["aB3_ \n-.\x1f\x00'", "aB \u00e9\u0130\u00df\u0301\u0e31\u8bf7\U00020000\U0001f600\ud800\u2019\u00bd-"]
)
def test_texts_say_what_their_words_are_as_a_pattern_finds_them(alphabet: str) -> None:
    rng = random.Random(0)
    texts = ["", "".join(map(chr, range(128))), "...", *("".join(rng.choices(alphabet, k=n % 30)) for n in range(600))]
    assert said(texts) == [" ".join(re.findall(r"\w+", text.casefold())).ljust(5) + " " for text in texts]
    assert [said([text]) for text in texts[:40]] == [[text] for text in said(texts)[:40]]


@pytest.mark.parametrize("known", [0, 1, 50, 5000])
def test_what_is_known_is_found_whether_there_is_more_or_less_of_it_than_asked_for(known: int) -> None:
    rng = np.random.default_rng(0)
    given, asked = (rng.integers(0, 2**64, size, np.uint64) for size in (known, 500))
    given[: known // 2] >>= np.uint64(5)  # so that many want the same slot
    asked[::3] = rng.choice(given, len(asked[::3])) if known else 0
    expected = np.array([each in set(given.tolist()) for each in asked.tolist()])
    assert Known(np.sort(given)).has(asked).tolist() == expected.tolist()


def test_equal_words_have_equal_hashes_wherever_they_stand_and_others_have_others() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["ab", "ba", "abc", "a", "aa", "b"], k=rng.randint(1, 9))) for _ in range(300)]
    found = Batch.of(texts).words()
    flat = [word for text in texts for word in text.split()]
    assert len(flat) == len(found.hashes)
    assert len(set(zip(flat, found.hashes.tolist(), strict=True))) == len(set(flat)) == len(set(found.hashes.tolist()))
    assert np.diff(found.ends, prepend=0).tolist() == [len(text.split()) for text in texts]


def test_texts_of_a_batch_do_not_run_into_each_other() -> None:
    texts = ["one two three four five", "six seven eight nine ten", "a b c d e f g h i"]
    batch = Batch.of(texts)
    hashes, is_one = batch.shingles()
    first = np.flatnonzero(is_one)
    assert Counter(batch.row_of[first].tolist()) == {row: len(text) - 4 for row, text in enumerate(texts)}
    alone = [Batch.of([text]).shingles() for text in texts]
    assert hashes[first].tolist() == [value for found, kept in alone for value in found[kept].tolist()]
    assert [chr(batch.characters[place]) for place in first[:3]] == ["o", "n", "e"]
    words = batch.words()
    runs, begin = words.runs()
    assert begin.tolist() == [10, 11]
    assert len(set(runs.tolist())) == 2
    assert len(set(batch.texts().tolist())) == 3
    assert batch.texts().tolist() == [value for text in texts for value in Batch.of([text]).texts().tolist()]


@pytest.mark.parametrize("cells", [4, 2**12])
def test_frequent_is_what_more_texts_hold_than_asked(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fall into one counter of the coarse count."""
    monkeypatch.setattr(near_duplicates, "CELLS", cells)
    rng = np.random.default_rng(0)
    texts = [np.unique(mixed(rng.zipf(1.3, 40).astype(np.uint64))) for _ in range(200)]
    counts = Counter(value for text in texts for value in text.tolist())

    def batches() -> Iterator[tuple[near_duplicates.Hashes, near_duplicates.Rows]]:
        for start in range(0, len(texts), 10):
            part = [np.concatenate([text, text[:3]]) for text in texts[start : start + 10]]
            yield np.concatenate(part), np.repeat(np.arange(len(part)), [len(text) for text in part])

    for most in (0, 3, 19.5, 1000):
        expected = sorted(value for value, count in counts.items() if count > most)
        assert frequent((hashes for hashes, _ in batches()), batches, more_than=most).tolist() == expected


def test_batches_hold_every_text_in_order_and_stay_small() -> None:
    texts = ["abcdef"] * 5 + ["x" * 50] + ["ghijkl"] * 3
    found = list(in_batches(texts, max_texts=4, max_chars=40))
    assert [text for batch in found for text in batch] == texts
    assert [len(batch) for batch in found] == [4, 2, 3]
