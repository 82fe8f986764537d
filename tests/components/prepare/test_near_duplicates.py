import random
import re

import pytest

from components.prepare import icd10
from components.prepare.near_duplicates import COMMON, near_duplicates


def terms(count: int) -> list[str]:
    """Of the example, neighbours among them."""
    found = [row["messages"][1]["content"] for row in icd10.rows()]
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
    """Of 100 shingles 55 are held out, and 0.55 times 100 is 55.00000000000001."""
    text = "".join(chr(0x4E00 + place) for place in range(104))
    assert near_duplicates([text], [text[:59]], similarity=0.55) == [True]
    assert near_duplicates([text], [text[:58]], similarity=0.55) == [False]
