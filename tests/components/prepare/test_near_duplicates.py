import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from components.prepare import near_duplicates as compared
from components.prepare.icd10 import rows as example_rows
from components.prepare.near_duplicates import Batch, Comparison, Hashes, MinHash, Signed


def near_duplicates(prompts: list[str], held_out: list[str], *, similarity: float) -> list[bool]:
    """One flag per prompt: whether it is near a held-out one."""
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(prompts, held_out, similarity=similarity, folder=Path(folder))
        return [row is not None for row in comparison.near_held_out(prompts)]


def terms(count: int) -> list[str]:
    """Terms of the example, neighbours among them."""
    found = [row["messages"][1]["content"] for row in example_rows()]
    return found[5000 : 5000 + count]


def _said(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


class Judge:
    """The rule by its words: five characters in a row, but for common ones, with and without shared runs of words."""

    def __init__(self, corpus: list[str], held_out: list[str], similarity: float = 0.8) -> None:
        self.similarity = similarity
        fives = Counter(each for text in held_out for each in self.fives(_said(text)))
        self.common = {each for each, count in fives.items() if count > max(3, len(held_out) / 20)}
        runs = Counter(run for words in {_said(text) for text in corpus} for run in set(self.runs(words.split())))
        self.shared = {run for run, count in runs.items() if count > max(10, len(corpus) / 100)}

    @staticmethod
    def fives(said: str) -> set[str]:
        return {said[start : start + 5] for start in range(len(said) - 4)}

    @staticmethod
    def runs(words: list[str]) -> list[str]:
        return [" ".join(words[start : start + 8]) for start in range(len(words) - 7)]

    def sets(self, text: str) -> tuple[set[str], set[str]]:
        said = _said(text)
        is_own = [True] * len(said)
        words, start = said.split(), 0
        for place, word in enumerate(words):
            if any(run in self.shared for run in self.runs(words[max(0, place - 7) : place + 8])):
                is_own[start : start + len(word)] = [False] * len(word)
            if start:
                is_own[start - 1] = False
            start += len(word) + 1
        places = range(len(said) - 4)
        own = {said[start : start + 5] for start in places if any(is_own[start : start + 5])}
        return self.fives(said) - self.common, own - self.common

    def are_near(self, one: str, other: str) -> bool:
        if _said(one) == _said(other):
            return True
        pairs = zip(self.sets(one), self.sets(other), strict=True)
        return all(len(a & b) >= self.similarity * len(a | b) and a and b for a, b in pairs)


@pytest.mark.parametrize("similarity", [0.8, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.5, 1.0))])
def test_every_pair_that_is_as_similar_is_found_and_no_other(similarity: float) -> None:
    some = [term for term in terms(700) if term.isascii() and "_" not in term and len(term) >= 5]
    random.Random(0).shuffle(some)
    held_out, prompts = some[:140], some[140:]
    judge = Judge(some, held_out, similarity)
    expected = [any(judge.are_near(ours, theirs) for theirs in held_out) for ours in prompts]
    assert near_duplicates(prompts, held_out, similarity=similarity) == expected
    assert sum(expected) < len(prompts)
    assert any(expected) or similarity == 1.0


def test_what_every_prompt_says_makes_none_like_another() -> None:
    asked = "Answer in one word and without a full stop. Which of the twenty-two chapters has "
    held_out = [asked + term for term in ("Mpox", "Stye", "Noma", "Glaucoma", "Gout", "Scurvy")]
    prompts = [asked + term for term in ("Rickets", "Zoster", "Glaucomas", "stye!")]
    assert near_duplicates(prompts, held_out, similarity=0.8) == [False, False, True, True]


def test_texts_too_short_to_compare_are_like_their_equals_alone() -> None:
    assert near_duplicates(["a", "A", "b", ""], ["a", "abc"], similarity=0.8) == [True, True, False, False]


def test_a_share_that_is_just_the_one_asked_for_is_as_similar() -> None:
    """55 of 100 shingles are held out, and 0.55 times 100 is 55.00000000000001."""
    text = "".join(chr(0x4E00 + place) for place in range(104))
    assert near_duplicates([text], [text[:59]], similarity=0.55) == [True]
    assert near_duplicates([text], [text[:58]], similarity=0.55) == [False]


VOCABULARY = ["".join(random.Random(n).choices("etaoinshrdlucmfwyp", k=2 + n % 8)) for n in range(6000)]


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=words))


def edited(rng: random.Random, text: str) -> str:
    """Another case and punctuation, or a word added, lost or changed."""
    words = text.split()
    place = rng.randrange(len(words))
    changes = [
        [word.upper() for word in words],
        [*words[:place], prose(rng, 1), *words[place:]],
        [*words[:place], *words[place + 1 :]],
        [*words[:place], prose(rng, 1), *words[place + 1 :]],
    ]
    return ", ".join(rng.choice(changes)) + "!"


@pytest.mark.parametrize("instructions", [0, 30])
def test_planted_near_duplicates_are_found_among_templates_and_nothing_else_is(instructions: int) -> None:
    rng = random.Random(instructions)
    forms = [prose(rng, 70) + "\n" for _ in range(instructions)] or [""]
    held_out = [prose(rng, rng.randint(8, 40)) for _ in range(400)]
    fresh = [prose(rng, rng.randint(8, 40)) for _ in range(2000)]
    planted = [edited(rng, text) for text in held_out]
    asked, known = ([rng.choice(forms) + text for text in texts] for texts in (fresh, held_out))
    again = [text.replace(own, copy) for text, own, copy in zip(known, held_out, planted, strict=True)]
    judge = Judge([*asked, *again, *known], known)
    expected = [judge.are_near(copy, text) for copy, text in zip(again, known, strict=True)]
    found = near_duplicates([*asked, *again], known, similarity=0.8)
    assert sum(expected) > 150
    assert not any(found[: len(fresh)])
    is_near, is_found = np.array(expected), np.array(found[len(fresh) :])
    assert np.count_nonzero(is_near & ~is_found) <= 0.01 * sum(expected)
    assert not np.any(is_found & ~is_near)


def test_a_document_makes_no_two_of_its_questions_near() -> None:
    rng = random.Random(0)
    pages = [prose(rng, 150) for _ in range(50)]
    rows = [f"{page}\n\n{prose(rng, 9)}?" for page in pages for _ in range(20)]
    rng.shuffle(rows)
    assert not any(near_duplicates(rows[100:], rows[:100], similarity=0.8))


def test_a_question_that_is_asked_of_other_documents_is_not_near_itself() -> None:
    rng = random.Random(0)
    pages = [prose(rng, 150) for _ in range(60)]
    asked = [prose(rng, 7) for _ in range(20)]
    rows = [f"{page}\n\n{question}?" for page in pages for question in asked]
    rng.shuffle(rows)
    assert not any(near_duplicates(rows[120:], rows[:120], similarity=0.8))


def test_prompts_that_say_the_same_of_their_own_and_less_in_whole_are_not_near(tmp_path: Path) -> None:
    rng = random.Random(0)
    form, ends = prose(rng, 80), [prose(rng, 14) for _ in range(2)]
    asked = [prose(rng, 7) for _ in range(40)]
    others = [f"{form} {end} {prose(rng, 7)}" for end in ends for _ in range(20)]
    held_out = [f"{form} {ends[0]} {question}" for question in asked]
    prompts = [f"{form} {ends[1]} {question}" for question in asked]
    judge = Judge([*others, *prompts, *held_out], [])
    assert all(judge.sets(one)[1] & judge.sets(other)[1] for one, other in zip(prompts, held_out, strict=True))
    comparison = Comparison([*others, *prompts], held_out[:3], similarity=0.8, folder=tmp_path)
    assert [*comparison.near_held_out([*prompts, held_out[2].upper() + "!"])] == [*[None] * 40, 2]


def test_prompts_that_are_all_shared_text_are_near_their_equals_alone() -> None:
    rng = random.Random(0)
    form = prose(rng, 30)
    rows = [f"{form} {prose(rng, 9)}" for _ in range(200)]
    found = near_duplicates([*rows, form.upper(), f"{form} {form}"], [form], similarity=0.8)
    assert found == [*[False] * 200, True, False]


def test_a_prompt_that_comes_often_is_no_shared_text() -> None:
    """Its copies count once, in whatever case."""
    rng = random.Random(0)
    form = prose(rng, 30)
    rows = [rng.choice([form, form.upper(), f"({form})"]) for _ in range(100)]
    held_out = [edited(rng, form), *(prose(rng, 30) for _ in range(20))]
    judge = Judge([*rows, *held_out], held_out)
    assert judge.are_near(rows[0], held_out[0])
    assert near_duplicates(rows, held_out, similarity=0.8) == [True] * 100


def test_repeats_are_counted_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [prose(rng, 30) for _ in range(300)]
    copies = [edited(rng, text) for text in rows[:50]]
    held_out = [prose(rng, 30)]
    judge = Judge([*rows, *copies], held_out)
    expected = sum(judge.are_near(text, copy) for text, copy in zip(rows, copies, strict=False))
    assert expected > 20

    def repeats(prompts: list[str], kept: np.ndarray | None = None) -> int:
        comparison = Comparison([*rows, *copies], held_out, similarity=0.8, folder=tmp_path)
        list(comparison.near_held_out(prompts))
        return comparison.repeats(prompts, np.ones(len(prompts), bool) if kept is None else kept)

    given = [*rows, *copies]
    assert repeats(given) == expected
    assert repeats([*rows, *rows[:7], *rows[:7]]) == 14
    assert repeats(rows) == 0
    assert repeats(["?", "ok", "?", "ok", "?"]) == 3  # a text of no word has no set to compare
    kept = np.array([rng.random() < 0.7 for _ in given])
    some = [text for text, is_kept in zip(given, kept, strict=True) if is_kept]
    monkeypatch.setattr(compared, "KEPT_BYTES", 2**12)  # and few sets are kept
    monkeypatch.setattr(compared, "PAIRS_AT_ONCE", 5)
    assert repeats(given, kept) == repeats(some) > 10


# MinHash.


def pairs(both: int, ours: int, theirs: int, *, count: int) -> tuple[Hashes, np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of so many pairs of sets, whose pair each is of, and of which of the two sets."""
    size = both + ours + theirs
    hashes = np.random.default_rng(size).integers(0, 2**64, size * count, np.uint64)
    place = np.tile(np.arange(size), count)
    return hashes, np.repeat(np.arange(count), size), place < both + ours, (place < both) | (place >= both + ours)


@pytest.mark.parametrize(("size", "similarity"), [(10, 0.5), (10, 0.9), (20, 0.8), (500, 0.8)])
def test_pairs_of_just_the_similarity_are_found_however_small_the_sets(size, similarity, tmp_path):
    count = 4000
    hashes, rows, in_one, in_other = pairs(round(size * similarity), size - round(size * similarity), 0, count=count)
    minhash = MinHash(similarity)
    ours, theirs = (minhash.signatures(hashes, rows, is_in, is_in, texts=count) for is_in in (in_one, in_other))
    is_found, signed = np.zeros(count, bool), Signed(tmp_path, "theirs")
    signed.add(theirs, np.zeros(count, np.uint64))
    for band, keys in enumerate(ours.bands):
        places, texts = compared.Band(*signed.in_band(band, np.ones(count, bool))).with_hash(keys, most=64)
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


@pytest.mark.parametrize("texts", [0, 3000])
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
        signed.add(compared.Signatures(hashes[:, part], minima, is_found[part]), np.zeros(size, np.uint64))
    if texts > 1:
        minima = np.arange(2 * texts, dtype=np.uint8).reshape(texts, 2)
        assert signed.minima_at(np.array([texts - 1, 0])).tolist() == minima[[-1, 0]].tolist()
    band = compared.Band(*signed.in_band(1, kept))
    asked = np.concatenate([hashes[1, ::2], rng.integers(0, 2**32, 500, np.uint32)])
    for most in (1, 3, 10**6):
        found = list(zip(*(each.tolist() for each in band.with_hash(asked, most=most)), strict=True))
        assert found == [
            (place, text)
            for place, value in enumerate(asked.tolist())
            for text in np.flatnonzero((hashes[1] == value) & is_found & kept)[:most].tolist()
        ]


# Hashes of words and shingles.


def said(texts: list[str]) -> list[str]:
    """What a batch holds of each text."""
    batch = Batch.of(texts)
    points = batch.characters.tolist()
    return ["".join(map(chr, points[start:end])) for start, end in zip([0, *batch.ends], batch.ends, strict=False)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Stye, left EYE!", ["stye", "left", "eye"]),
        ("...", []),
        ("请问 Mpox是什么", ["请", "问", "mpox", "是", "什", "么"]),
        ("สวัสดี abc", [*"สวสด", "abc"]),
        ("안녕 세상", ["안녕", "세상"]),
    ],
)
def test_words_are_what_stands_between_spaces_and_characters_where_scripts_have_none(text: str, words) -> None:
    (points,) = said([text])
    starts = Batch.of([text]).words().first.tolist()
    assert [points[start:end].strip() for start, end in pairwise([*starts, len(points)])] == words


@pytest.mark.parametrize(
    "alphabet", ["aB3_ \n-.\x1f\x00'", "aB \u00e9\u0130\u00df\u0301\u0e31\u8bf7\U00020000\U0001f600\ud800\u2019\u00bd-"]
)
def test_texts_say_what_their_words_are_as_a_pattern_finds_them(alphabet: str) -> None:
    rng = random.Random(0)
    texts = ["", "".join(map(chr, range(128))), "...", *("".join(rng.choices(alphabet, k=n % 30)) for n in range(600))]
    assert said(texts) == [" ".join(re.findall(r"\w+", text.casefold())).ljust(5) + " " for text in texts]
    assert [said([text]) for text in texts[:40]] == [[text] for text in said(texts)[:40]]


@pytest.mark.parametrize("cells", [4, 2**12])
def test_frequent_is_what_more_texts_hold_than_asked(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fall into one counter of the coarse count."""
    monkeypatch.setattr(compared, "CELLS", cells)
    rng = np.random.default_rng(0)
    texts = [np.unique(compared.mixed(rng.zipf(1.3, 40).astype(np.uint64))) for _ in range(200)]
    counts = Counter(value for text in texts for value in text.tolist())

    def batches() -> Iterator[tuple[Hashes, compared.Rows]]:
        for start in range(0, len(texts), 10):
            part = [np.concatenate([text, text[:3]]) for text in texts[start : start + 10]]
            yield np.concatenate(part), np.repeat(np.arange(len(part)), [len(text) for text in part])

    for most in (0, 3, 19.5, 1000):
        expected = sorted(value for value, count in counts.items() if count > most)
        assert compared.frequent((hashes for hashes, _ in batches()), batches, more_than=most).tolist() == expected
