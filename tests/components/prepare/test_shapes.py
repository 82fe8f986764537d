import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import config_file
from components.config.train import ColumnsConfig
from components.prepare.dataset import Record
from components.prepare.prepare import require_usable
from components.prepare.shapes import unread_text
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from tests.doubles.datasets import Read, read

Write = Callable[..., str]
EXAMPLE = Path(__file__).parents[3] / "pipelines" / "configs" / "icd10.toml"


def read_rows(name: str, **columns: Any) -> Read:
    found = read(find_sources(name), columns=ColumnsConfig(**columns))
    require_usable(found.counts, max_reject_share=0, columns=ColumnsConfig(**columns))
    return found


def the_record(name: str, **columns: Any) -> tuple[list[tuple[str, str]], str]:
    (record,) = (each.record for each in read_rows(name, **columns).accepted)
    return [(turn.role, turn.content) for turn in record.prompt], record.answer


SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
SAID_BY_SYSTEM = {"from": "system", "value": "s"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "shape", "prompt"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt and completion", [("user", "a")]),
        ({"messages": TURNS}, "messages", [("user", "a")]),
        ({"instruction": "a", "input": "", "output": "b", "text": "..."}, "Alpaca", [("user", "a")]),
        ({"instruction": "a", "input": "i", "output": "b"}, "Alpaca", [("user", "a\n\ni")]),
        ({"instruction": "a", "output": "b", "system": "s"}, "Alpaca", [("system", "s"), ("user", "a")]),
        (
            {"instruction": "a", "output": "b", "history": [["q", "r"]]},
            "Alpaca",
            [("user", "q"), ("assistant", "r"), ("user", "a")],
        ),
        ({"conversations": SHARE_GPT}, "ShareGPT", [("user", "a")]),
        ({"conversations": SHARE_GPT, "system": "s"}, "ShareGPT", [("system", "s"), ("user", "a")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, *SHARE_GPT]},
            "ShareGPT",
            [("system", "s"), ("user", "a")],
        ),
        ({"conversations": TURNS}, "ShareGPT", [("user", "a")]),
        ({"question": "a", "answer": "b", "topic": "t"}, "question and answer", [("user", "a")]),
    ],
)
def test_a_row_is_known_by_its_columns_from_jsonl_and_from_parquet(
    row: dict[str, Any], shape: str, prompt: list[tuple[str, str]], write_rows: Write, tmp_path: Path
) -> None:
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), parquet)
    for name in (write_rows([row]), str(parquet)):
        assert the_record(name) == (prompt, "b")
        assert read_rows(name).counts.shapes == {shape: 1}


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"body": "a", "label": "b"}, {"prompt": "body", "completion": "label"}, [("user", "a")]),
        ({"prompt": "a", "response": "b"}, {"completion": "response"}, [("user", "a")]),
        ({"t": "a", "b": "c", "y": "b"}, {"prompt": ["t", "b"], "completion": "y"}, [("user", "a\n\nc")]),
        ({"t": "a", "b": None, "y": "b"}, {"prompt": ["t", "b"], "completion": "y"}, [("user", "a")]),
        ({"chat": SHARE_GPT}, {"messages": "chat"}, [("user", "a")]),
        ({"chat": TURNS, "s": "s"}, {"messages": "chat", "system": "s"}, [("system", "s"), ("user", "a")]),
        (
            {"q": "a", "y": "b", "s": "s"},
            {"prompt": "q", "completion": "y", "system": "s"},
            [("system", "s"), ("user", "a")],
        ),
        ({"prompt": "a", "completion": "b", "s": "s"}, {"system": "s"}, [("system", "s"), ("user", "a")]),
        (
            {"question": "a", "answer": "b", "prompt": "x", "completion": "y"},
            {"prompt": "question", "completion": "answer"},
            [("user", "a")],
        ),
    ],
)
def test_the_config_says_which_column_is_which(
    row: dict[str, Any], columns: dict[str, Any], prompt: list[tuple[str, str]], write_rows: Write, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Query": "a", "Output": "b"}, "data.columns.prompt=Query --set data.columns.completion=Output"),
        ({"body": "a", "y": "b"}, "data.columns.prompt=body --set data.columns.completion=COLUMN"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "set data.columns.completion=chosen"),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            re.escape(
                '--set \'data.columns.prompt=["instruction", "context"]\' --set data.columns.completion=response'
            ),
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "prompt=question --set data.columns.completion=response --set data.columns.system=system_prompt",
        ),
        ({"text": "a"}, "A column 'text' alone does not say which part is the answer"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, r"conversations\[N\].from is 'alien': expected human"),
    ],
)
def test_what_is_in_no_known_shape_is_refused_with_the_way_out(
    row: dict[str, Any], message: str, write_rows: Write
) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write_rows([row] * 2))


@pytest.mark.parametrize(
    ("row", "left", "prompt"),
    [
        ({"question": "a", "context": "c", "answer": "b", "t": "x"}, {"context", "t"}, [("user", "a\n\nc")]),
        ({"prompt": "a", "Passage": "c", "completion": "b"}, {"Passage"}, [("user", "a\n\nc")]),
        (
            {"instruction": "a", "input": "", "context": "c", "output": "b", "system": "s"},
            {"context"},
            [("system", "s"), ("user", "a\n\nc")],
        ),
        ({"messages": TURNS, "system": "s", "context": "c"}, {"system", "context"}, [("system", "s"), ("user", "a")]),
    ],
)
def test_columns_that_are_not_read_are_named_with_options_that_read_them(
    row: dict[str, Any], left: set[str], prompt: list[tuple[str, str]], write_rows: Write
) -> None:
    name = write_rows([row])
    counts = read_rows(name).counts
    assert counts.unread == dict.fromkeys(left, 1)
    text = unread_text(counts.unread, counts.columns, ColumnsConfig())
    assert all(f"{each} (1 row)" in text for each in left)
    options = text.partition("too: ")[2]
    named = config_file.load(EXAMPLE, shlex.split(options)[1::2]).data.columns
    assert the_record(name, **named.model_dump()) == (prompt, "b")


def test_a_column_with_a_space_in_its_name_can_be_pasted_into_a_shell() -> None:
    named = ColumnsConfig(prompt="q", completion="my answer")
    text = unread_text({"context": 1}, ["q", "context", "my answer"], named)
    _, prompt, _, completion = shlex.split(text.partition("too: ")[2])
    assert (prompt, completion) == ('data.columns.prompt=["q", "context"]', "data.columns.completion=my answer")


def test_columns_that_are_like_no_part_of_a_prompt_come_without_options(write_rows: Write) -> None:
    counts = read_rows(write_rows([{"prompt": "a", "completion": "b", "topic": "t"}] * 2)).counts
    assert unread_text(counts.unread, counts.columns, ColumnsConfig()) == "columns not read: topic (2 rows)"


def test_columns_of_each_rows_own_shape_are_read(write_rows: Write) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"question": "c", "answer": "d"}, {"prompt": "e", "completion": "f"}]
    assert not read_rows(write_rows(rows)).counts.unread


def test_a_column_that_no_row_has_is_named(write_rows: Write) -> None:
    with pytest.raises(
        DataError,
        match=r"found 'prompt', 'x'; .*No row has the columns that data\.columns names: prompt = 'body'",
    ):
        read_rows(write_rows([{"prompt": "a", "x": "b"}]), prompt="body", completion="label")
    with pytest.raises(DataError, match="label is missing"):
        read_rows(write_rows([{"body": "a", "x": "b"}]), prompt="body", completion="label")


def test_what_was_recognised_is_said_once_with_a_row_and_its_record(
    write_rows: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = write_rows([{"question": "Who?", "answer": "Me"}, {"question": "When?", "answer": "Now"}])
    read_rows(name)
    (message,) = [each.message for each in caplog.records if "is read as" in each.message]
    assert message == (
        f"{name}:1 is read as question and answer: "
        '{"question": "Who?", "answer": "Me"} becomes the prompt \'Who?\' and the answer \'Me\''
    )


def test_rows_in_todays_forms_are_what_they_were(write_rows: Write) -> None:
    rows = [{"id": 1, "prompt": "a", "completion": "b", "question": "q", "answer": "x"}, {"messages": TURNS}]
    found = [each.record for each in read_rows(write_rows(rows)).accepted]
    assert [record.answer for record in found] == ["b", "b"]
    assert isinstance(found[0], Record)
    assert found[0].id == "1"
