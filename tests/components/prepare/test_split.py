import hashlib
import random

import pytest

from components.prepare import near_duplicates
from components.prepare.dataset import Record
from components.prepare.split import position
from components.shared.errors import DataError
from tests.doubles.datasets import KeyedRecord, deduplicate, split, validate


def named(identity: object, prompt: str, answer: str = "a") -> KeyedRecord:
    return validate({"id": identity, "prompt": prompt, "completion": answer})


def many(count: int, start: int = 0) -> list[KeyedRecord]:
    return [validate({"prompt": f"question {i}", "completion": "a"}) for i in range(start, start + count)]


def ids(records: list[Record]) -> set[str]:
    return {record.id for record in records}


def name_in(low: float, high: float, prefix: str = "r") -> str:
    """An id whose key's hash lies between the two."""
    return next(
        name
        for name in (f"{prefix}{i}" for i in range(100_000))
        if low <= position(hashlib.sha256(f"id:{name}".encode()).digest()) < high
    )


def test_an_id_that_another_record_has_by_its_content_is_a_later_state_of_that_one() -> None:
    plain = validate({"prompt": "question", "completion": "a"})
    rows = [plain, named(plain.record.id, "p"), named(plain.content.hex(), "q")]
    found = deduplicate(rows)
    assert sorted(each.record.prompt[0].content for each in found.records) == ["p", "q"]
    assert (found.duplicate, found.superseded_by_same_id) == (0, 1)


def test_a_known_record_never_changes_its_place() -> None:
    # The place on the circle of hashes is part of the format: a change would leak evaluated records into training.
    assert position(validate({"prompt": "question 1", "completion": "a"}).key) == pytest.approx(0.5203768, abs=1e-6)
    assert position(named("row-1", "x").key) == pytest.approx(0.5103874, abs=1e-6)


@pytest.mark.parametrize("max_records", [0, 100])
def test_a_refresh_never_moves_a_record_from_eval_to_train(max_records: int) -> None:
    rows = [named(i, f"question {i % 200}", f"answer {i % 100}") for i in range(900)]
    before = rows[:250]
    first = split(deduplicate(before).records, eval_share=0.3, max_records=max_records)
    second = split(deduplicate(rows).records, eval_share=0.3, max_records=max_records)
    assert first.evaluation
    assert not ids(first.evaluation) & ids(second.train)
    # Nor does its content, under another id.
    evaluated = {(str(record.prompt), record.answer) for record in first.evaluation}
    assert not evaluated & {(str(record.prompt), record.answer) for record in second.train}


def test_a_train_record_whose_prompt_is_much_like_one_in_eval_is_dropped() -> None:
    held_out, near, other = name_in(0, 0.5), name_in(0.5, 1), name_in(0.5, 1, "s")
    rows = [named(held_out, "Fracture of left femur"), named(near, "FRACTURE of left femur."), named(other, "Mpox")]
    result = split(rows, eval_share=0.5, max_records=0, near_duplicates=0.8)
    assert (ids(result.train), ids(result.evaluation)) == ({other}, {held_out})
    assert (result.prompt_in_eval, result.near_duplicate_of_eval) == (0, 1)
    assert ids(split(rows, eval_share=0.5, max_records=0).train) == {near, other}


def with_copies(count: int) -> list[KeyedRecord]:
    """Records of which every fifth has another that says the same in capitals, and most have a third."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghi\u00e9 ", k=60)) for _ in range(count)]
    copies = [text.upper() for text in texts[::5]]
    return [validate({"prompt": text, "completion": "a"}) for text in [*texts, *copies, *(f"{x}." for x in copies)]]


@pytest.mark.slow
@pytest.mark.parametrize("max_records", [300, 1300])
def test_max_records_gives_what_comparing_all_records_gives(max_records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them are compared."""
    few_at_once = {"most": 64, "most_chars": 2**16}  # so that the others are not even looked at
    monkeypatch.setattr(near_duplicates.batches_of, "__kwdefaults__", few_at_once)
    rows = with_copies(1000)
    everything = split(rows, eval_share=0.2, max_records=0, near_duplicates=0.8)
    limited = split(rows, eval_share=0.2, max_records=max_records, near_duplicates=0.8)
    # The parts of a split without near-duplicates, of which nothing is compared.
    apart = [*everything.train, *everything.evaluation]
    distinct = [each for each in rows if each.record in apart]
    expected = split(distinct, eval_share=0.2, max_records=max_records)
    assert limited.train == expected.train
    assert limited.evaluation == expected.evaluation
    left_out = limited.near_duplicate_of_eval + limited.over_max_records
    assert len(limited.train) + len(limited.evaluation) + left_out == len(rows) - limited.prompt_in_eval
    assert (limited.near_duplicate_of_eval < everything.near_duplicate_of_eval) == (max_records < 1300)


def test_more_near_duplicates_than_the_config_allows_stop_the_run_with_what_most_are_near_to() -> None:
    held_out = [named(name_in(0, 0.5, f"h{i}-"), f"{letter * 8} the question") for i, letter in enumerate("abc")]
    near = [
        named(name_in(0.5, 1, f"n{i}-"), f"{letter * 8} THE question" + "!" * i) for i, letter in enumerate("aaaab")
    ]
    other = [named(name_in(0.5, 1, f"o{i}-"), letter * 12) for i, letter in enumerate("vwxyz")]
    rows = [*held_out, *near, *other]
    allowed = split(rows, eval_share=0.5, max_records=0, near_duplicates=0.8, max_reject_share=0.5)
    assert allowed.near_duplicates["left_out_share"] == 0.5
    assert allowed.near_duplicates["most_are_near"][0] == {"begins": "aaaaaaaa the question", "records": 4}
    with pytest.raises(DataError) as caught:
        split(rows, eval_share=0.5, max_records=0, near_duplicates=0.8, max_reject_share=0.49)
    message = str(caught.value).splitlines()
    assert message[0].startswith("50.0% of what would be trained on is near what is held out (5 of 10 records)")
    assert message[1:3] == ["  4 x near 'aaaaaaaa the question'", "  1 x near 'bbbbbbbb the question'"]
    for remedy in ("data.group", "data.near_duplicates", "data.max_reject_share=0.5"):
        assert remedy in message[3]
    with pytest.raises(DataError, match=r"100\.0% of what would be trained on"):  # and not: too few records
        split([*held_out, *near], eval_share=0.5, max_records=0, near_duplicates=0.8, max_reject_share=0.49)


def test_near_duplicates_within_train_are_counted_and_stay() -> None:
    result = split(with_copies(100), eval_share=0.2, max_records=0, near_duplicates=0.8)
    texts = [record.prompt[0].content.lower().rstrip(". ") for record in result.train]
    assert result.near_duplicates["in_train"] == len(texts) - len(set(texts)) > 10


def test_a_group_stands_on_one_side_and_stays_there_when_it_grows() -> None:
    def rows(of_each: range) -> list[KeyedRecord]:
        given = [
            {"id": f"{g}-{i}", "code": g, "prompt": f"{g} {i}", "completion": "a"} for g in range(80) for i in of_each
        ]
        return [validate(row, group="code") for row in given]

    first, second = (split(rows(range(size)), eval_share=0.3, max_records=0) for size in (3, 6))
    for result in (first, second):
        held_out, trained = ({record.group for record in part} for part in (result.evaluation, result.train))
        assert held_out | trained == {str(group) for group in range(80)}
        assert not held_out & trained
    assert ids(first.evaluation) <= ids(second.evaluation)
    assert len(first.evaluation) == pytest.approx(72, abs=30)


def test_max_records_fills_up_from_the_other_split_when_one_is_short() -> None:
    records = sorted(many(1000), key=lambda each: each.key)
    few_train = records[:200] + records[-10:]
    result = split(few_train, eval_share=0.5, max_records=100)
    assert (len(result.train), len(result.evaluation)) == (10, 90)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0.1, 1, r"1 distinct records are too few: with data.eval_share = 0.1, 1 are in train and 0 in eval.*raise"),
        (0, 0.1, r"0 are in train and 1 in eval.*Add records or lower data.eval_share"),
    ],
)
def test_an_empty_split_is_refused_with_what_to_change(low: float, high: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split([named(name_in(low, high), "p")], eval_share=0.1, max_records=0)
    with pytest.raises(DataError, match=r"data\.max_records = 1, 0 are in train"):
        split(many(100), eval_share=0.2, max_records=1)
