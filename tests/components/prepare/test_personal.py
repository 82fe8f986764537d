"""Personal data on the way from rows to a dataset. What it is, is read back from the published files by pyarrow."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from components.prepare.dataset import Message, Record
from components.prepare.personal import Screen, find, mask
from components.prepare.prepare import prepare
from components.shared.errors import DataError

EMAIL, CARD, IBAN = "jane.doe@example.org", "4539 1488 0343 6467", "DE89 3704 0044 0532 0130 00"
ROWS = [
    *({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(60)),
    {"prompt": f"I am {EMAIL}", "completion": f"and pay by {CARD}"},
    {"prompt": "where to?", "completion": f"to {IBAN}, and write to {EMAIL}"},
]


@pytest.fixture
def prepared(store, tmp_path, write_rows, run_config):
    """The texts of both splits and of the rejects, and the profile."""

    def run(**data: str) -> tuple[str, dict, object]:
        source = write_rows([*ROWS, {"prompt": f"no answer, {EMAIL}"}])
        found = prepare(run_config(source, max_reject_share=0.5, **data), store)
        texts = []
        for part in ("train/part-00000.parquet", "eval/part-00000.parquet", "rejects.parquet"):
            store.download(f"datasets/{found.dataset_id}/{part}", tmp_path / "part.parquet")
            texts.append(json.dumps(pq.read_table(tmp_path / "part.parquet").to_pylist()))
        return "".join(texts), store.get_json(f"datasets/{found.dataset_id}/profile.json"), found

    return run


def test_by_default_it_is_counted_and_stays(prepared):
    texts, profile, found = prepared()
    assert profile["personal"] == {"records": 2, "found": {"email": 2, "card": 1, "iban": 1}}
    assert texts.count(EMAIL) == 3
    assert found.train_records + found.eval_records == len(ROWS)


def test_masked_it_is_nowhere_in_what_is_stored(prepared):
    texts, profile, found = prepared(personal="mask")
    assert "no answer" not in texts  # a raw row may hide what no pattern finds
    assert not any(piece in texts for piece in (EMAIL, CARD, IBAN))
    assert "and pay by [CARD]" in texts
    assert "to [IBAN], and write to [EMAIL]" in texts
    assert profile["personal"]["found"] == {"email": 2, "card": 1, "iban": 1}
    assert found.train_records + found.eval_records == len(ROWS)


def test_dropped_its_records_are_left_out_and_accounted_for(prepared):
    texts, profile, found = prepared(personal="drop")
    assert not any(piece in texts for piece in (EMAIL, CARD, IBAN))
    assert found.train_records + found.eval_records == len(ROWS) - 2
    assert profile["dropped"]["personal_data"] == 2
    assert profile["rows"]["read"] == len(ROWS) + 1
    assert "2 with personal data" in found.summary


def test_a_dataset_without_any_is_the_same_whatever_is_done_with_it(store, write_rows, run_config):
    source = write_rows(ROWS[:60])
    reported, masked = (prepare(run_config(source, personal=do), store).dataset_id for do in ("report", "mask"))
    assert reported == masked


def test_the_arguments_of_a_tool_call_are_screened_and_stay_json():
    calls = json.dumps([{"function": {"name": "mail", "arguments": {"to": EMAIL, "count": 2}}}])
    asks = Message("assistant", "", json.dumps({"tool_calls": json.loads(calls)}))
    record = Record("1", [Message("user", "Mail."), asks, Message("tool", "done")], "", calls)
    screened, found = Screen("mask").record(record)
    for listed in (json.loads(screened.calls), json.loads(screened.prompt[1].more)["tool_calls"]):
        assert listed[0]["function"]["arguments"] == {"to": "[EMAIL]", "count": 2}
    assert Screen("report").record(record) == (record, found) == (record, {"email": 2})
    assert Screen().suspects({7: record, 8: Record("2", [Message("user", "Why?")], "So.")}) == [7]


def test_names_need_presidio_and_say_so():
    with pytest.raises(DataError, match="pip install presidio-analyzer"):
        Screen("mask", names=True)


def test_where_presidio_is_installed_names_are_masked_too(monkeypatch):
    """A stand-in with the one call of AnalyzerEngine that is used: it knows one name."""

    class AnalyzerEngine:
        def analyze(self, text: str, language: str, entities: list[str]) -> list[SimpleNamespace]:
            assert (language, entities) == ("en", ["PERSON"])
            start = text.find("Jane Doe")
            return [SimpleNamespace(start=start, end=start + 8)] if start >= 0 else []

    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=AnalyzerEngine))
    screen, record = Screen("mask", names=True), Record("1", [Message("user", "Who?")], f"Jane Doe, {EMAIL}")
    assert screen.suspects({3: record}) == [3]
    assert screen.record(record)[0].answer == "[NAME], [EMAIL]"


# What is found in a committed set: 148 texts, half of them with numbers and names that only look like personal data.
#
# Addresses, cards and IBANs are Faker's (40.63, eight locales), phone numbers are published ones, tokens are random
# with their issuers' prefixes; the sentences are ours. A mark in each token keeps scanners from taking it for a leak.

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
