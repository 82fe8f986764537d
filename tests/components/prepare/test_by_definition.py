"""That a dataset is what its definition says: here it is written down plainly, over lists, and compared with what is
made on disk, in as little memory as DuckDB works in."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.config.train import DataConfig
from components.prepare.dataset import Record
from components.prepare.split import deduplicate as deduplicate_in
from components.prepare.split import split as split_in
from tests.doubles.datasets import KeyedRecord, deduplicate, holding, split, validate

LITTLE = 2**27
"""Bytes, of which DuckDB has a part."""


def id_of(train: Sequence[Record], evaluation: Sequence[Record]) -> str:
    digest = hashlib.sha256(b"fineloop dataset 1\n")
    for name, records in (("train", train), ("eval", evaluation)):
        digest.update(f"{name}\n".encode())
        for each in records:
            turns = [[turn.role, turn.content, *([turn.more] if turn.more else [])] for turn in each.prompt]
            more = [each.calls, each.tools] if each.calls or each.tools or each.group else []
            identity = [each.id, turns, each.answer, *more, *([each.group] if each.group else [])]
            digest.update(json.dumps(identity, ensure_ascii=False).encode() + b"\n")
    return "d" + digest.hexdigest()[:15]


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


TEXTS = (
    "plain",
    'with "quotes" and \\',
    "two\nlines\tand\ra tab",
    "\x00\x01\x1f\x7f",
    "Zoë 🤦🏼‍♂️ 傷",
    "\u2028\ufeff",
    "'",
    "",
)


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
@pytest.mark.parametrize(
    ("max_records", "window", "grouped"), [(500, False, True), (0, True, True), (300, True, False)]
)
def test_both_sides_and_the_id_are_those_of_the_definition(max_records: int, window: bool, grouped: bool) -> None:
    given = rows(0, 3000, grouped=grouped)
    options: dict[str, Any] = {"eval_share": 0.13, "max_records": max_records, "replay_share": 0.3 if window else 0.0}
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
