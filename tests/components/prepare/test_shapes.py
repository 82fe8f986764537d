import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.train import ColumnsConfig
from components.prepare.prepare import require_usable
from components.prepare.shapes import unread_text
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from tests.doubles.datasets import Read, read

Write = Callable[..., str]


def read_rows(name: str, **columns: Any) -> Read:
    found = read(find_sources(name), columns=ColumnsConfig(**columns))
    require_usable(found.counts, max_reject_share=0, columns=ColumnsConfig(**columns))
    return found


def the_record(name: str, **columns: Any) -> tuple[list[tuple[str, str]], str]:
    (record,) = (each.record for each in read_rows(name, **columns).accepted)
    return [(turn.role, turn.content) for turn in record.prompt], record.answer


SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
SAID_BY_SYSTEM = {"from": "system", "value": "s"}
QUESTION, WITH_HISTORY = {"question": "a", "answer": "b"}, {"instruction": "a", "output": "b", "history": [["q", "r"]]}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "shape", "prompt"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt and completion", [("user", "a")]),
        ({"messages": TURNS}, "messages", [("user", "a")]),
        ({"instruction": "a", "input": "", "output": "b", "text": "..."}, "Alpaca", [("user", "a")]),
        ({"instruction": "a", "input": "i", "output": "b"}, "Alpaca", [("user", "a\n\ni")]),
        ({"instruction": "a", "output": "b", "system": "s"}, "Alpaca", [("system", "s"), ("user", "a")]),
        (WITH_HISTORY, "Alpaca", [("user", "q"), ("assistant", "r"), ("user", "a")]),
        ({"instruction": "a", "context": "c", "response": "b"}, "Dolly", [("user", "a\n\nc")]),
        ({"instruction": "a", "context": "", "response": "b", "category": "x"}, "Dolly", [("user", "a")]),
        ({"instruction": "a", "answer": "b"}, "instruction and answer", [("user", "a")]),
        (QUESTION | {"instruction": "i"}, "question and answer", [("user", "a")]),
        ({"problem": "a", "solution": "b"}, "problem and solution", [("user", "a")]),
        ({"conversations": SHARE_GPT}, "ShareGPT", [("user", "a")]),
        ({"conversations": SHARE_GPT, "system": "s"}, "ShareGPT", [("system", "s"), ("user", "a")]),
        ({"conversations": [SAID_BY_SYSTEM, *SHARE_GPT]}, "ShareGPT", [("system", "s"), ("user", "a")]),
        ({"conversations": TURNS}, "ShareGPT", [("user", "a")]),
        (QUESTION | {"topic": "t"}, "question and answer", [("user", "a")]),
    ],
)
def test_a_row_is_known_by_its_columns_from_jsonl_and_from_parquet(row, shape, prompt, write_rows, tmp_path) -> None:
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), parquet)
    for name in (write_rows([row]), str(parquet)):
        assert the_record(name) == (prompt, "b")
        assert read_rows(name).counts.shapes == {shape: 1}


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"body": "a", "label": "b"}, {"prompt": "body", "completion": "label"}, [("user", "a")]),
        ({"t": "a", "b": "c", "y": "b"}, {"prompt": ["t", "b"], "completion": "y"}, [("user", "a\n\nc")]),
        ({"t": "a", "b": None, "y": "b"}, {"prompt": ["t", "b"], "completion": "y"}, [("user", "a")]),
        ({"chat": SHARE_GPT}, {"messages": "chat"}, [("user", "a")]),
        ({"chat": TURNS, "s": "s"}, {"messages": "chat", "system": "s"}, [("system", "s"), ("user", "a")]),
        ({"prompt": "a", "completion": "b", "s": "s"}, {"system": "s"}, [("system", "s"), ("user", "a")]),
        (QUESTION | {"prompt": "x"}, {"prompt": "question", "completion": "answer"}, [("user", "a")]),
    ],
)
def test_the_config_says_which_column_is_which(row, columns, prompt, write_rows: Write, tmp_path: Path) -> None:
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), parquet)
    for name in (write_rows([row]), str(parquet)):
        assert the_record(name, **columns) == (prompt, "b")


def test_ids_tools_and_labels_that_are_numbers_have_columns_of_their_own(write_rows: Write) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    name = write_rows([{"key": 7, "text": "a", "label": 3, "fns": tools}])
    (keyed,) = read_rows(name, prompt="text", completion="label", id="key", tools="fns").accepted
    assert keyed.named
    assert (keyed.record.id, keyed.record.answer, json.loads(keyed.record.tools)) == ("7", "3", tools)


def test_rows_of_a_csv_may_hold_a_conversation_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,conversations\n1,"' + json.dumps(SHARE_GPT).replace('"', '""') + '"\n')
    assert the_record(str(path)) == ([("user", "a")], "b")


def test_columns_that_are_not_read_are_named(write_rows: Write) -> None:
    question = {"question": "a", "context": "c", "answer": "b", "t": "x"}
    rows = [question, {"messages": TURNS, "system": "s"}, {"instruction": "a", "output": "b"}]
    counts = read_rows(write_rows(rows)).counts
    assert counts.unread == {"context": 1, "t": 1, "system": 1}
    assert unread_text(counts.unread).startswith("columns not read: context (1 row), t (1 row), system (1 row). data.c")
    many = unread_text({f"c{number}": 1 for number in range(12)} | {"messages[].reasoning_content": 3})
    assert "c9 (1 row) and 3 more. To train on reasoning" in many


def test_a_mistyped_column_is_asked_about(write_rows: Write) -> None:
    name = write_rows([{"body": "a", "x": "b"}])
    with pytest.raises(DataError, match=r"bdy is missing: did you mean 'body'\?"):
        read_rows(name, prompt="bdy", completion="x")
    with pytest.raises(DataError, match=r"prompt = \['bdy'\], completion = 'label': did you mean 'body'\?"):
        read_rows(name, prompt=["bdy"], completion="label")


def test_a_column_that_no_row_has_is_named(write_rows: Write) -> None:
    with pytest.raises(DataError, match=r"found 'prompt', 'x'; .*data\.columns names: prompt = 'body'"):
        read_rows(write_rows([{"prompt": "a", "x": "b"}]), prompt="body", completion="label")
    with pytest.raises(DataError, match="label is missing"):
        read_rows(write_rows([{"body": "a", "x": "b"}]), prompt="body", completion="label")
