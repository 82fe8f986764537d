"""What is found in a committed set: 148 texts, half of them with numbers and names that only look like personal data.

Addresses, cards and IBANs are Faker's (40.63, eight locales), phone numbers are published ones, tokens are random with
their issuers' prefixes; the sentences are ours. A mark in each token keeps scanners from taking it for a leaked one.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from components.prepare.personal import Span, find, mask
from components.prepare.rows import example_rows

SET = Path(__file__).with_name("personal.jsonl")
MARK = "\u2042"


def labelled() -> list[tuple[str, list[tuple[str, str]]]]:
    rows = [json.loads(line.replace(MARK, "")) for line in SET.read_text(encoding="utf-8").splitlines()]
    return [(row["text"], [(kind, piece) for kind, piece in row["spans"]]) for row in rows]


def test_of_the_committed_set_nearly_all_is_found_and_nothing_else():
    right, found, expected = Counter(), Counter(), Counter()
    for text, pieces in labelled():
        ours = [(span.kind, text[span.start : span.end]) for span in find(text)]
        found.update(kind for kind, _ in ours)
        expected.update(kind for kind, _ in pieces)
        right.update(kind for kind, _ in {*ours} & {*pieces})
    assert expected == {"email": 19, "phone": 17, "card": 13, "iban": 13, "secret": 14}
    assert right == expected - Counter(phone=1)  # Ofcom's number for films, which its own plan does not give out
    assert found == right


def test_in_titles_of_diseases_is_none():
    assert [text for row in example_rows() for text in [row["messages"][1]["content"]] if find(text)] == []


@pytest.mark.parametrize(
    ("text", "regions", "masked"),
    [
        ("write to a@b.org or c@d.org", [], "write to [EMAIL] or [EMAIL]"),
        ("call 030 901820", ["DE"], "call [PHONE]"),
        ("call 030 901820", [], "call 030 901820"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", [], "[IBAN] AND MORE"),
        ("DE89 3704 0044 0532 0130 01 has a wrong digit", [], "DE89 3704 0044 0532 0130 01 has a wrong digit"),
        ("4012 8888 8888 1881, and 4012 8888 8888 1882", [], "[CARD], and 4012 8888 8888 1882"),
        ("5105 1051 0510 5106 and 4539 1488 0343 6467", [], "5105 1051 0510 5106 and [CARD]"),
        ("https://me:secret@host.example.com/x", [], "https://me:[EMAIL]/x"),
    ],
)
def test_a_mask_names_the_kind_and_leaves_the_rest(text, regions, masked):
    assert mask(text, find(text, regions=regions)) == masked


def test_pieces_do_not_overlap_and_lie_in_order():
    for text, _ in labelled():
        spans = find(text, regions=["DE", "US"])
        assert spans == sorted(spans, key=lambda span: span.start)
        assert all(one.end <= two.start for one, two in pairwise(spans))
        assert all(isinstance(span, Span) for span in spans)
