import sys
from collections import Counter

import pytest

from components.prepare import prepare
from components.prepare.rows import CHAPTERS, TASK, _example_terms, example_rows
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from tests.doubles.datasets import read


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """Term and chapter of every row."""
    found = []
    for row in example_rows():
        system, user, assistant = row["messages"]
        assert system == {"role": "system", "content": TASK}
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append({"id": row["id"], "term": user["content"], "chapter": assistant["content"]})
    return found


def test_every_row_of_the_example_is_usable() -> None:
    example = read(find_sources("example://icd10"))
    prepare.require_usable(example.counts, max_reject_share=0.0)
    assert len(example.accepted) == 12_533


def test_a_known_term_has_its_chapter(rows: list[dict[str, str]]) -> None:
    assert {"id": "icd10cm/Mpox", "term": "Mpox", "chapter": "Infections"} in rows
    chapters = {row["id"].removeprefix("icd10cm/"): row["chapter"] for row in rows}
    assert chapters["Stye"] == "Eye"
    assert chapters["RARS"] == "Neoplasms"
    assert chapters["Noma"] == "Infections"


def test_every_chapter_occurs_and_none_is_larger_than_an_eighth(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["chapter"] for row in rows)
    assert set(counts) == set(CHAPTERS.values())
    assert len(counts) == 22
    assert max(counts.values()) / len(rows) < 0.126


def test_ids_and_prompts_are_unique(rows: list[dict[str, str]]) -> None:
    assert len({row["id"] for row in rows}) == len({row["term"] for row in rows}) == len(rows)


def test_a_term_under_two_chapters_is_left_out(rows: list[dict[str, str]]) -> None:
    chapters_of: dict[str, set[str]] = {}
    for term, chapter, _ in _example_terms():
        chapters_of.setdefault(term, set()).add(chapter)
    ambiguous = {term for term, chapters in chapters_of.items() if len(chapters) > 1}
    assert len(ambiguous) == 5
    assert not ambiguous & {row["id"].removeprefix("icd10cm/") for row in rows}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(DataError, match=r"pip install 'fineloop\[local\]'"):
        next(example_rows())
