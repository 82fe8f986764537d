import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.prepare import near_duplicates as compared
from components.prepare.near_duplicates import COMMON, MOST_COMPARED, Comparison
from components.prepare.rows import example_rows


def near_duplicates(prompts: list[str], held_out: list[str], *, similarity: float) -> list[bool]:
    """One flag per prompt: whether it is near a held-out one."""
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(prompts, held_out, similarity=similarity, folder=Path(folder))
        return [row is not None for row in comparison.near_held_out(prompts)]


def terms(count: int) -> list[str]:
    """Terms of the example, neighbours among them."""
    found = [row["messages"][1]["content"] for row in example_rows()]
    return found[5000 : 5000 + count]


def jaccard(one: str, other: str, common: set[str]) -> float:
    """By the definition, on sets of texts."""
    sets = []
    for text in (one, other):
        said = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
        sets.append({said[start : start + 5] for start in range(len(said) - 4)} - common)
    union = sets[0] | sets[1]
    return len(sets[0] & sets[1]) / len(union) if union else 0.0


@pytest.mark.parametrize("similarity", [0.8, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.5, 1.0))])
def test_every_pair_that_is_as_similar_is_found_and_no_other(similarity: float) -> None:
    some = [term for term in terms(700) if term.isascii() and "_" not in term and len(term) >= 5]
    random.Random(0).shuffle(some)
    held_out, prompts = some[:140], some[140:]
    shingles = [{said[i : i + 5] for i in range(len(said) - 4)} for said in map(_said, held_out)]
    counts = {each: sum(each in one for one in shingles) for each in set().union(*shingles)}
    common = {each for each, count in counts.items() if count > COMMON * len(held_out)}
    expected = [any(jaccard(ours, theirs, common) >= similarity for theirs in held_out) for ours in prompts]
    assert near_duplicates(prompts, held_out, similarity=similarity) == expected
    assert sum(expected) < len(prompts)
    assert any(expected) or similarity == 1.0


def _said(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def test_case_punctuation_and_white_space_hide_nothing() -> None:
    held_out = terms(400)
    changed = [f"  {term.upper()}." for term in held_out]
    assert sum(near_duplicates(changed, held_out, similarity=1.0)) == 400


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


# What follows is judged by `Judge`, which reckons with sets of texts and loops over all pairs.

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


class Judge:
    """The rule by its words: five characters in a row, but for common ones, with and without shared runs of words."""

    def __init__(self, corpus: list[str], held_out: list[str]) -> None:
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
        return all(len(a & b) >= 0.8 * len(a | b) and a and b for a, b in pairs)


@pytest.mark.parametrize("instructions", [0, 10, 30, 60])
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
    missed, wrong = (
        sum(theirs > ours for theirs, ours in pairs)
        for pairs in (zip(expected, found[len(fresh) :], strict=True), zip(found[len(fresh) :], expected, strict=True))
    )
    assert missed <= 0.01 * sum(expected)
    assert wrong == 0


@pytest.mark.parametrize("instructions", [10, 30, 60])
def test_a_tasks_instruction_makes_no_two_messages_near(instructions: int) -> None:
    rng = random.Random(0)
    forms = [prose(rng, 70) for _ in range(instructions)]
    rows = [f"{rng.choice(forms)}\n\n{prose(rng, rng.randint(6, 14))}" for _ in range(8000)]
    assert not any(near_duplicates(rows[800:], rows[:800], similarity=0.8))


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
    assert near_duplicates([*rows, form.upper(), f"{form} {form}"], [form], similarity=0.8) == [
        *[False] * 200,
        True,
        False,
    ]


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


def test_of_a_band_each_is_compared_with_the_first_of_its_hash_and_with_the_one_before() -> None:
    keys, rows = np.array([5, 5, 5, 5, 7, 8, 8], np.uint32), np.array([0, 3, 6, 9, 2, 1, 4])
    pairs = compared._neighbours(keys, rows, size=10)
    assert [divmod(pair, 10) for pair in pairs.tolist()] == [(3, 0), (4, 1), (6, 0), (6, 3), (9, 0), (9, 6)]


def test_prompts_of_a_long_form_with_short_gaps_take_no_longer_the_more_there_are(tmp_path: Path) -> None:
    """They share no run of eight words, and most pairs are candidates: at most sixteen of them are compared."""
    rng = random.Random(0)
    gaps = [prose(rng, 4) for _ in range(6)]
    rows = [" ".join(f"{part} {prose(rng, 1)}" for part in gaps) for _ in range(1200)]
    compared: list[object] = []

    class Counting(Comparison):
        def _are_near(self, one: Any, other: Any) -> bool:
            compared.append(one)
            return super()._are_near(one, other)

    comparison = Counting(rows[600:], rows[:600], similarity=0.8, folder=tmp_path)
    assert len(list(comparison.near_held_out(rows[600:]))) == 600
    assert len(compared) <= 600 * MOST_COMPARED


def test_what_is_asked_for_lazily_is_compared_no_further(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [prose(rng, 10) for _ in range(60)]
    read: list[str] = []

    def reading() -> Iterator[str]:
        for row in rows * 400:
            read.append(row)
            yield row

    found = Comparison(rows, rows[:10], similarity=0.8, folder=tmp_path).near_held_out(reading())
    assert [next(found) for _ in range(11)] == [*range(10), None]
    assert len(read) <= 512
