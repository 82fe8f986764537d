"""That rows which are taken together become what each becomes by itself."""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.train import ColumnsConfig, LossOn
from components.prepare.personal import Action, Screen, find, may_hold
from components.prepare.shapes import as_record, recognised
from components.prepare.sources import find_sources
from components.prepare.validate import keyed, unread_keys
from components.prepare.validate import validate as checked
from components.registry.between_runs import Erased, record_hash
from components.shared.errors import DataError
from tests.doubles.datasets import KeyedRecord, keyed_records, read

TEXTS = (
    "plain",
    "a trailing space \t\u3000\x1f",
    "",
    "   ",
    "Zoë 🤦🏼‍♂️ 傷",
    "Zoe\u0308",
    "e" + "\u0301" * 31,
    "\ud800",
    "write to ann@example.com",
    "risk-free @ 5, right?",
    "+49 30 901820, or 2024-01-02 03:04",
    "٠١٢٣٤٥٦٧٨",
    "\x00 and \u2028",
    7,
    None,
    True,
    ["x"],
    {"type": "text", "text": "x"},
)
IDS = ("a", "b", "", 7, 0, -1, 2**70, 1.5, True, None, "\ud800", "x" * 4097, "y" * 4096)


def content(rng: random.Random) -> Any:
    return rng.choice(TEXTS) if rng.random() < 0.2 else f"text {rng.randrange(50)}"


def turn(rng: random.Random, role: str) -> Any:
    role = rng.choice(("critic", "tool", "system")) if rng.random() < 0.03 else role
    more: dict[str, Any] = {"name": "f", "tool_calls": rng.choice([None, [], [{"name": "f"}], "x"])}
    if rng.random() < 0.5:
        more = {
            "weight": rng.choice([0, 0, 0, 0, 1, 1.0, None, True, 2]),
            "reasoning_content": rng.choice([None, "hm"]),
        }
        role = "developer" if role == "system" else role
    return {"role": role, "content": content(rng), **(more if rng.random() < 0.15 else {})}


def conversation(rng: random.Random) -> list[Any]:
    turns = [turn(rng, "system")] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(4)):
        turns += [turn(rng, "user"), turn(rng, "assistant")]
    return turns


def some_row(rng: random.Random) -> Any:
    made: dict[str, Any] = {"prompt": content(rng), "completion": content(rng)}
    kind = rng.random()
    if kind < 0.3:
        made = {"messages": conversation(rng)}
    elif kind < 0.4:
        made["prompt"] = [*conversation(rng), turn(rng, "user")]
    elif kind < 0.5:
        made = {"question": made["prompt"], "answer": made["completion"]}
    elif kind < 0.6:
        made = {"instruction": made["prompt"], "input": content(rng), "output": made["completion"], "system": "s"}
    elif kind < 0.65:
        made = {"conversations": [{"from": "human", "value": content(rng)}, {"from": "gpt", "value": "x"}]}
    elif kind < 0.7:
        made |= {"messages": conversation(rng)}
    if rng.random() < 0.5:
        made["id"] = rng.choice(IDS) if rng.random() < 0.3 else str(rng.randrange(10**6))
    if rng.random() < 0.1:
        made |= {rng.choice(("tools", "g", "other")): rng.choice([None, [], [{"name": "f"}], "x", 3, ""])}
    return made if rng.random() < 0.98 else rng.choice([made and [made], "x", None, {}])


def by_itself(
    value: Any, group: str, action: Action, loss_on: LossOn, unread: Counter[str]
) -> KeyedRecord | str | None:
    """What a row becomes: a record, the reason why not, or nothing where it is withheld; `unread` counts its keys."""
    columns = ColumnsConfig()
    try:
        if isinstance(value, dict):
            value = as_record(value, recognised(tuple(value), columns), columns, group=group)
            unread.update(unread_keys(value))
        screened, found = Screen(action).record(checked(value, group=group, loss_on=loss_on))
    except DataError as exc:
        return str(exc)
    return None if found and action == "drop" else next(keyed_records(keyed([screened])))


@pytest.mark.parametrize(
    ("action", "group", "loss_on"), [("report", "", "all"), ("mask", "g", "last"), ("drop", "", "last")]
)
@pytest.mark.parametrize("seed", range(2))
def test_rows_read_together_become_what_each_becomes_by_itself(
    seed: int, action: Action, group: str, loss_on: LossOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.prepare.rows.BYTES_AT_ONCE", 5000)
    rng = random.Random(seed)
    rows = [some_row(rng) for _ in range(3000)]
    if group:
        rows = [{"g": rng.choice(["u", "v", 3, "é"]), **each} if isinstance(each, dict) else each for each in rows]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    unread: Counter[str] = Counter()
    expected = [by_itself(each, group, action, loss_on, unread) for each in rows]
    found = read(find_sources(str(path)), group=group, personal=action, loss_on=loss_on)
    records = [each for each in expected if isinstance(each, KeyedRecord)]
    turns = [turn for each in records for turn in each.record.prompt]
    assert list(map(astuple, found.accepted)) == list(map(astuple, records))
    reasons = [(line, each) for line, each in enumerate(expected, start=1) if isinstance(each, str)]
    assert [(each.line, each.reason) for each in found.rejects] == reasons
    assert found.counts.withheld == expected.count(None)
    assert {name: count for name, count in found.counts.unread.items() if "[]" in name} == unread
    assert min(unread["messages[].reasoning_content"], sum(not turn.is_learned for turn in turns)) > 5
    assert found.counts.num_rows == len(rows)
    assert min(len(records), len(reasons)) > 500


def test_rows_of_parquet_become_what_those_of_json_lines_do(
    tmp_path: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.prepare.rows.BYTES_AT_ONCE", 999)
    rng = random.Random(0)
    rows = [
        {"id": rng.choice([None, str(number)]), "messages": [{"role": "user", "content": f"q{number}"}]}
        for number in range(500)
    ]
    for each in rows:
        answer = {"role": "assistant", "content": rng.choice(["a ", "b", "", "ü"])}
        each["messages"] = [*each["messages"], answer]  # type: ignore[misc]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    one, other = (read(find_sources(name)) for name in (str(tmp_path / "x.parquet"), write_rows(rows)))
    assert one.accepted == other.accepted
    assert [(each.line, each.reason) for each in one.rejects] == [(each.line, each.reason) for each in other.rejects]


def test_records_that_were_erased_are_left_out_by_id_and_by_content(write_rows: Callable[..., str]) -> None:
    rows: list[Any] = [{"prompt": f"q{number}", "completion": "a"} for number in range(20)]
    rows += [{"id": str(number), "prompt": f"p{number}", "completion": "a"} for number in range(20)]
    name = write_rows(rows)
    everything = read(find_sources(name)).accepted
    of_nobody, of_content = everything[7].record.id, everything[9].content.hex()
    erased = Erased(frozenset(map(record_hash, (of_nobody, of_content, "3"))))
    found = read(find_sources(name), erased=erased)
    left = [each for place, each in enumerate(everything) if place not in (7, 9, 23)]
    assert (found.accepted, found.counts.erased) == (left, 3)


def test_no_text_with_personal_data_is_passed_over() -> None:
    lines = Path(__file__).with_name("personal.jsonl").read_text().splitlines()
    committed = [json.loads(line)["text"] for line in lines]
    texts = [*committed, *(each for each in TEXTS if isinstance(each, str) and each.isprintable())]
    hints = may_hold(pa.array(texts)).to_pylist()
    assert all(hint for text, hint in zip(texts, hints, strict=True) if find(text, regions=["DE", "US", "GB"]))
    digits = [chr(each) for each in range(sys.maxunicode + 1) if chr(each).isdecimal()]
    assert all(may_hold(pa.array([each + "12 34" + each + "56" for each in digits])).to_pylist())
    plain_texts = ["Why is the sky blue?", "risk-free, right through the night", "12 + 34 = 46", "at 5 @ home"]
    assert not any(may_hold(pa.array(plain_texts)).to_pylist())


def test_a_document_is_read_or_refused_however_deeply_it_is_nested(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "x.json", []
    for depth in range(900, 1000):
        path.write_text('[{"prompt": "q", "completion": "a", "x": ' + "[" * depth + "]" * depth + "}]")
        try:
            outcomes.append(len(read(find_sources(str(path))).accepted))
        except DataError:
            outcomes.append(0)
    assert set(outcomes) == {0, 1}
