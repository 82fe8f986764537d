import dataclasses
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.config.train import DataConfig
from components.prepare import near_duplicates
from components.prepare.dataset import Message, Record
from components.prepare.power import power
from components.prepare.split import deduplicate as deduplicate_in
from components.prepare.split import judges, lacking, position, validation_and_test
from components.prepare.split import split as split_in
from components.shared.errors import DataError
from tests.doubles import datasets
from tests.doubles.datasets import KeyedRecord, deduplicate, holding, split, validate


def named(identity: object, prompt: str, answer: str = "a") -> KeyedRecord:
    return validate({"id": identity, "prompt": prompt, "completion": answer})


def many(count: int, start: int = 0) -> list[KeyedRecord]:
    return [validate({"prompt": f"question {i}", "completion": "a"}) for i in range(start, start + count)]


def ids(records: list[Record]) -> set[str]:
    return {record.id for record in records}


def name_in(low: float, high: float, prefix: str = "r") -> str:
    """An id whose key's hash lies between the two."""
    names = (f"{prefix}{i}" for i in range(100_000))
    return next(name for name in names if low <= position(hashlib.sha256(f"id:{name}".encode()).digest()) < high)


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
    near = [named(name_in(0.5, 1, f"n{i}-"), f"{text * 8} THE question" + "!" * i) for i, text in enumerate("aaaab")]
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
        places = [(group, place) for group in range(80) for place in of_each]
        given = [{"id": f"{g}-{i}", "code": g, "prompt": f"{g} {i}", "completion": "a"} for g, i in places]
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


LITTLE = 2**27
"""Bytes, of which DuckDB has a part."""


def id_of(train: Sequence[Record], evaluation: Sequence[Record]) -> str:
    splits = {}
    for name, records in (("train", train), ("eval", evaluation)):
        digest = hashlib.sha256()
        for each in records:
            turns = [[turn.role, turn.content, *([turn.more] if turn.more else [])] for turn in each.prompt]
            more = [each.calls, each.tools] if each.calls or each.tools or each.group else []
            identity = [each.id, turns, each.answer, *more, *([each.group] if each.group else [])]
            digest.update(json.dumps(identity, ensure_ascii=False).encode() + b"\n")
        splits[name] = digest.hexdigest()
    body = json.dumps({"format": 2, "splits": splits}, sort_keys=True, separators=(",", ":"))
    return "d" + hashlib.sha256(body.encode()).hexdigest()[:15]


def distinct(rows: Sequence[KeyedRecord]) -> tuple[list[KeyedRecord], int, int]:
    """The last row of an id, then of one content the one with the smallest place; repeated; replaced by a later row."""
    latest: dict[tuple[bool, bytes], KeyedRecord] = {}
    repeated = replaced = 0
    for row in rows:
        identity = (row.named, row.key if row.named else row.content)
        if identity in latest:
            repeated += latest[identity].content == row.content
            replaced += latest[identity].content != row.content
        latest[identity] = row
    chosen: dict[bytes, KeyedRecord] = {}
    for row in sorted(latest.values(), key=lambda each: (each.place, each.key)):
        repeated += row.content in chosen
        chosen.setdefault(row.content, row)
    # Of a row that gives the id that another has by its content, that one is an earlier state.
    given = {row.record.id for row in chosen.values() if row.named}
    kept = [row for row in chosen.values() if row.named or row.record.id not in given]
    return kept, repeated, replaced + len(chosen) - len(kept)


def divided(
    rows: Sequence[KeyedRecord], *, eval_share: float, max_records: int, recent: Set[bytes] | None, replay_share: float
) -> tuple[list[Record], list[Record]]:
    ordered = sorted(rows, key=lambda each: (each.place, each.key, each.content))
    held_out = [each for each in ordered if int.from_bytes(each.place[:8]) / 2**64 < eval_share]
    asked = {tuple(each.record.prompt) for each in held_out}
    train = [each for each in ordered[len(held_out) :] if tuple(each.record.prompt) not in asked]
    if recent is not None:
        inside = [each for each in train if each.content in recent]
        before = [each for each in train if each.content not in recent]
        salt = hashlib.sha256(b"".join(each.content for each in inside)).digest()
        before.sort(key=lambda each: hashlib.sha256(salt + each.content).digest())
        kept = {each.content for each in before[: round(len(inside) * replay_share / (1 - replay_share))]}
        train = [each for each in train if each.content in recent | kept]
    if max_records and len(train) + len(held_out) > max_records:
        of_eval = min(len(held_out), max(1, round(max_records * eval_share)))
        train = train[: max_records - of_eval]
        held_out = held_out[: max_records - len(train)]
    return [each.record for each in train], [each.record for each in held_out]


TEXTS = ("a", '"quotes" and \\', "two\nlines\tand\ra tab", "\x00\x01\x1f\x7f", "Zoë 🤦🏼‍♂️ 傷", "\u2028\ufeff", "'", "")


def rows(seed: int, count: int, *, grouped: bool = False) -> list[KeyedRecord]:
    """With ids that come again, contents that do, prompts with several answers, tools, turns, and groups."""
    rng = random.Random(seed)
    found: list[KeyedRecord] = []

    def text(most: int) -> str:
        return f"{rng.choice(TEXTS)}{rng.randrange(most)}"

    while len(found) < count:
        prompt: list[dict[str, Any]] = [{"role": "user", "content": text(count // 2)}]
        if rng.random() < 0.3:
            prompt = [{"role": "system", "content": text(2)}, *prompt]
        if rng.random() < 0.1:
            call = {"function": {"name": text(5), "arguments": {"a": text(5)}}}
            prompt += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": text(9), "name": "f"}]
        row: dict[str, Any] = {"messages": [*prompt, {"role": "assistant", "content": text(3)}]}
        if rng.random() < 0.5:
            row["id"] = rng.choice([f"r{rng.randrange(count)}", *(each.record.id for each in found[-3:])])
        if rng.random() < 0.1:
            row["tools"] = [{"name": text(3)}]
        if grouped:
            row["g"] = text(count // 20)
        found.append(validate(row, group="g" if grouped else "", source=rng.choice(["", "a.jsonl"])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_distinct_records_are_those_of_the_definition(grouped: bool) -> None:
    given = rows(2, 3000, grouped=grouped)
    expected, repeated, replaced = distinct(given)
    found = deduplicate(given, memory_bytes=LITTLE)
    assert Counter(map(repr, found.records)) == Counter(map(repr, expected))
    assert (found.duplicate, found.superseded_by_same_id) == (repeated, replaced)
    assert min(repeated, replaced) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("most", "window", "grouped"), [(500, False, True), (0, True, True), (300, True, False)])
def test_both_sides_and_the_id_are_those_of_the_definition(most: int, window: bool, grouped: bool) -> None:
    given = rows(0, 3000, grouped=grouped)
    options: dict[str, Any] = {"eval_share": 0.13, "max_records": most, "replay_share": 0.3 if window else 0.0}
    spans, recent = ([(500, 900), (2000, 2100)], {each.content for each in given[500:900] + given[2000:2100]})
    expected = divided(distinct(given)[0], **options, recent=recent if window else None)
    found = split(given, **options, window=spans if window else None, memory_bytes=LITTLE)
    assert (found.train, found.evaluation) == expected
    assert found.dataset_id == id_of(*expected)


def test_long_records_are_put_in_order_on_disk_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.prepare.workspace.BUCKET_BYTES", 2**20)
    text = "".join(random.Random(0).choices("abcdefgh ", k=30_000))
    given = [validate({"prompt": f"{n} {text[n % 999 :]}", "completion": str(n)}) for n in range(150)]
    expected = divided(given, eval_share=0.2, max_records=0, recent=None, replay_share=0)
    assert sum(len(each.prompt[0].content) for each in expected[0]) > 2 * 2**20
    found = split(given, eval_share=0.2, max_records=0, memory_bytes=LITTLE)
    assert (found.train, found.evaluation) == expected
    assert found.dataset_id == id_of(*expected)


def test_parts_end_where_the_records_say_and_change_neither_records_nor_id(monkeypatch, store) -> None:
    given = rows(0, 1000)
    whole = split(given, eval_share=0.2, max_records=0)
    monkeypatch.setattr("components.prepare.dataset.MOST_RECORDS", 100)
    monkeypatch.setattr("components.prepare.dataset.MOST_BYTES", 2000)
    with holding(given) as work:
        deduplicate_in(work)
        found = split_in(work, DataConfig(source=[], eval_share=0.2, near_duplicates=0.0))
        assert found.parts.dataset_id == whole.dataset_id
        assert (list(found.parts.train), list(found.parts.evaluation)) == (whole.train, whole.evaluation)
        sizes, ended = [], []
        for record in whole.train:
            sizes.append(len((record.answer + "".join(turn.content for turn in record.prompt)).encode()))
            if len(sizes) == 100 or sum(sizes) >= 2000:
                ended.append(len(sizes))
                sizes = []
        lengths = [pq.read_metadata(path).num_rows for path in found.parts.train.paths]
        assert lengths == [*ended, *([len(sizes)] if sizes else [])]
        assert len(lengths) > 5


NUMBER = 400
DRAWN = ["evaluate.records=20"]


def records(numbers: Iterable[int]) -> list[Record]:
    return [Record(f"r{number}", [Message("user", f"{number}?")], "a") for number in numbers]


@pytest.fixture
def config():
    data = {"source": "rows.jsonl"}
    return RunConfig.model_validate({"adapter": {"name": "colours"}, "model": {"base": "org/model"}, "data": data})


@pytest.fixture
def published(store):
    def publish(numbers: range = range(NUMBER)) -> str:
        return datasets.publish(store, train=records(range(1)), evaluation=records(numbers)).uri

    return publish


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["gate.min_records=200"], None),
        (["gate.min_records=400"], "raise data.eval_share, add data or lower gate.min_records$"),
        (["gate.min_records=200", *DRAWN], None),  # as many more as it takes are drawn
        (["gate.min_records=200", *DRAWN, "evaluate.max_records=20"], "^20 records .* evaluate.records,"),
    ],
    ids=str,
)
def test_a_run_that_would_be_held_for_want_of_records_is_refused(config, store, published, keys, message):
    """About 320 of 400 held-out records are left when training has looked at its fifth."""
    asked = config_file.loads(config_file.dumps(config), keys)
    lack = lacking(judges(store, published(), asked), asked)
    assert re.search(message, lack) if message else not lack


def test_records_of_one_group_count_as_one_as_they_do_for_the_gate(config, store):
    grouped = [dataclasses.replace(each, group=f"g{number % 50}") for number, each in enumerate(records(range(NUMBER)))]
    uri = datasets.publish(store, train=records(range(1)), evaluation=grouped).uri
    asked = config_file.loads(config_file.dumps(config), ["data.group=topic", "gate.min_records=50"])
    judging = judges(store, uri, asked)
    groups = len({record.group for record in judging.records})
    assert lacking(judging, asked).startswith(f"{groups} groups of records are left for the gate")
    assert f"{groups} groups of records judge by loss" in power(judging, asked)["sentence"]


@pytest.mark.parametrize(
    ("number", "keys", "can_replace"),
    [
        (400, [], True),
        (320, [], False),
        (320, ["data.validation_share=0.01"], True),
        (320, ["gate.worse_than_champion_by=0.1"], True),
        (320, ["gate.much_worse_share=1"], True),
        (320, ["gate.metric=exact_match"], True),
        (400, [*DRAWN, "evaluate.max_records=100"], False),
    ],
    ids=str,
)
def test_that_no_candidate_can_replace_a_version_is_said_before_there_is_one(
    config, store, published, keys, number, can_replace
):
    """By the binomial distribution 0.99^299 is the first power below 0.05."""
    asked = config_file.loads(config_file.dumps(config), keys)
    tells = power(judges(store, published(range(number)), asked), asked)
    assert (tells["better_by"] is not None) is can_replace
    assert ("nothing can replace it, as only 299 would show rare large losses" in tells["sentence"]) is not can_replace


def test_long_answers_weigh_more_so_that_more_records_are_asked_for(config, store):
    """Half of the answers are of one token, and half of 26: by Kish's formula 400 weigh as 214."""
    held_out = enumerate(records(range(NUMBER)))
    lengths = [dataclasses.replace(each, answer="a" * (100 * (place % 2))) for place, each in held_out]
    uri = datasets.publish(store, train=records(range(1)), evaluation=lengths).uri
    asked = config_file.loads(config_file.dumps(config), ["data.validation_share=0.001"])
    tells = power(judges(store, uri, asked), asked)
    assert tells["fewest"] == pytest.approx(299 * 2 * (1 + 26**2) / 27**2, rel=0.02)
    by_answers = config_file.loads(config_file.dumps(asked), ["gate.metric=answer_loss"])
    assert power(judges(store, uri, by_answers), by_answers)["fewest"] == 299


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_records_either_choose_or_judge_in_the_proportion_asked_for(share):
    validation, test = validation_and_test(records(range(2000)), validation_share=share)
    assert {each.id for each in validation} | {each.id for each in test} == {f"r{number}" for number in range(2000)}
    assert len(validation) + len(test) == 2000
    assert len(validation) / 2000 == pytest.approx(share, abs=0.03)
    assert validation_and_test(records([1]), validation_share=share) == (records([1]), records([1]))  # one is in both
    assert [each.id for each in test] == sorted((each.id for each in test), key=lambda name: int(name[1:]))


def test_no_record_moves_when_others_come_or_go():
    before, _ = validation_and_test(records(range(300)), validation_share=0.2)
    some = random.Random(1).sample(range(300), 150)
    after, _ = validation_and_test(records([*some, *range(1000, 1400)]), validation_share=0.2)
    kept = {each.id for each in before if int(each.id[1:]) in some}
    assert {each.id for each in after if int(each.id[1:]) < 300} == kept


def test_records_of_a_group_choose_or_judge_together():
    grouped = [dataclasses.replace(each, group=f"g{number // 3}") for number, each in enumerate(records(range(300)))]
    validation, test = ({each.group for each in part} for part in validation_and_test(grouped, validation_share=0.4))
    assert len(validation) + len(test) == len(validation | test) == 100
