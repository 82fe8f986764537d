"""The files that people have: each is taken as it is, or the refusal names the way in which it would be."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from components.config.train import ColumnsConfig
from components.prepare.prepare import require_usable
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from tests.doubles.datasets import read

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE_GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
HUMAN = [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]
PLAIN = {"prompt": "q", "completion": "a"}


def lines(*rows: Any, count: int = 20) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows * count).encode()


def accepted(path: Path, **columns: Any) -> set[tuple[str, str]]:
    """What is asked and answered in the file's records; DataError where a run would stop."""
    named = ColumnsConfig(**columns)
    found = read(find_sources(str(path)), columns=named)
    require_usable(found.counts, max_reject_share=0.05, columns=named)
    return {(each.record.prompt[-1].content, each.record.answer) for each in found.accepted}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.jsonl", lines(PLAIN)),
        ("messages.jsonl", lines({"messages": CHAT})),
        ("windows.jsonl", b"\xef\xbb\xbf" + lines(PLAIN).replace(b"\n", b"\r\n")),
        ("dirt.jsonl", lines(PLAIN, count=100) + b'{"prompt": "q", "completion": null}\n' + b"{broken\n"),
        ("alpaca.jsonl", lines({"instruction": "q", "input": "", "output": "a"})),
        ("questions.jsonl", lines({"question": "q", "answer": "a"})),
        ("sharegpt.jsonl", lines({"conversations": SHARE_GPT})),
        ("openai.jsonl", lines({"messages": PARTS})),
        ("rows.csv", b"prompt,completion\nq,a\n"),
        ("rows.tsv", b"prompt\tcompletion\nq\ta\n"),
        ("rows.json", json.dumps([PLAIN], indent=1).encode()),
        ("within.json", json.dumps({"version": 1, "data": [PLAIN]}).encode()),
        ("packed.jsonl.gz", gzip.compress(lines(PLAIN), mtime=0)),
        ("response.jsonl", lines({"prompt": "q", "response": "a", "model": "m"})),
        ("capitals.jsonl", lines({"Prompt": "q", "Completion": "a"})),
        ("speakers.jsonl", lines({"user": "q", "assistant": "a"})),
        ("input.csv", b"Input,Output\nq,a\n"),
        ("excel.csv", b"sep=;\r\nprompt;completion\r\nq;a\r\n"),
        ("one line.json", json.dumps({"data": [PLAIN] * 500}).encode()),
        ("lines.json", lines({**PLAIN, "x": "x" * 9000})),
        ("array.jsonl", json.dumps([PLAIN] * 5, indent=1).encode()),
    ],
)
def test_a_file_is_taken_as_it_is(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert accepted(path) == {("q", "a")}


def test_a_table_of_parquet_is_taken_as_it_is(tmp_path: Path) -> None:
    pd.DataFrame({"prompt": ["q"], "completion": ["a"]}).to_parquet(tmp_path / "x.parquet")
    assert accepted(tmp_path / "x.parquet") == {("q", "a")}


@pytest.mark.parametrize(
    ("row", "advice", "columns"),
    [
        (
            {"prompt": "q", "response": "a", "input": "", "output": "b"},
            "data.columns.prompt=.* --set data.columns.completion=output",
            {"completion": "response"},
        ),
        (
            {"Ask": "q", "Reply": "a"},
            "data.columns.prompt=COLUMN --set data.columns.completion=Reply",
            {"prompt": "Ask", "completion": "Reply"},
        ),
        (
            {"request": "q", "response": "a"},
            "where both are texts: --set data.columns.prompt=request --set data.columns.completion=response",
            {"prompt": "request", "completion": "response"},
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "set data.columns.completion=chosen",
            {"completion": "chosen"},
        ),
        ({"messages": HUMAN}, "data.columns.messages=messages reads such turns", {"messages": "messages"}),
        ({"messages": SHARE_GPT}, "data.columns.messages=messages reads such turns", {"messages": "messages"}),
    ],
)
def test_the_advice_of_a_refusal_is_one_that_works(
    row: dict[str, Any], advice: str, columns: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(row))
    with pytest.raises(DataError, match=advice):
        accepted(path)
    assert accepted(path, **columns) == {("q", "a")}


@pytest.mark.parametrize(
    ("name", "content", "way"),
    [
        ("nulls.jsonl", lines(*[PLAIN] * 9, {**PLAIN, "completion": None}), "Fix these rows or raise data.max_reject"),
        ("text.jsonl", lines({"text": "q a"}), "write prompt and completion apart"),
        (
            "latin.jsonl",
            lines(PLAIN).replace(b'"q"', b'"\xe4"'),
            "Windows or in Latin-1 iconv -f CP1252 -t UTF-8 does so",
        ),
        ("windows.json", '[{"prompt": "“q”"}]'.encode("cp1252"), r"not UTF-8 at byte 14\. Save it as UTF-8: .* CP1252"),
        (
            "split.json",
            json.dumps({"train": [PLAIN], "test": [PLAIN]}).encode(),
            "2 lists of rows, 'train', 'test': write",
        ),
        (
            "split.json",
            json.dumps({"train": [PLAIN] * 999, "test": [PLAIN]}).encode(),
            "write the one to train on as a f",
        ),
        (
            "columns.json",
            json.dumps({"prompt": ["q"] * 3, "completion": ["a"] * 3}).encode(),
            "holds columns: write its",
        ),
        ("pandas.json", pd.DataFrame([PLAIN] * 3).to_json().encode(), r'to_json\(FILE, orient="records"\) does'),
        (
            "joined.jsonl",
            lines(PLAIN).replace(b"\n", b" "),
            "another object begins at column 36: write each on a line of",
        ),
        (
            "joined.json",
            lines(PLAIN).replace(b"\n", b" "),
            "is not JSON: Extra data.*; write each object on a line of its",
        ),
        (
            "bare.csv",
            b"Mpox,Infections\nStye,Eye\n" * 9,
            "Where the first row holds data, write one with the columns' n",
        ),
        (
            "traces.jsonl",
            lines({"request": {"messages": CHAT[:1]}, "response": {}}),
            "as one list in a column messages",
        ),
        (
            "utf16.jsonl",
            lines(PLAIN).decode().encode("utf-16"),
            "is UTF-16: save it as UTF-8, as iconv -f UTF-16 -t UTF-8",
        ),
        ("utf16.csv", codecs.BOM_UTF16_BE + "prompt,completion\nq,a\n".encode("utf-16-be"), "is UTF-16"),
        ("rows.xlsx", b"PK", r"expected a name ending in \.jsonl.*; save the sheet as CSV \(UTF-8\)"),
        ("rows.zip", b"PK", "; unpack it"),
        (
            "data.arrow",
            b"ARROW1",
            r"; write it as Parquet, as datasets\.load_from_disk\(FOLDER\)\.to_parquet\(FILE\) does",
        ),
    ],
)
def test_what_no_config_reads_is_refused_with_what_to_do_about_it(
    name: str, content: bytes, way: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=way):
        accepted(path)


def test_a_folder_of_save_to_disk_is_named_as_one_and_not_read_as_its_description(tmp_path: Path) -> None:
    dataset = pa.table({"prompt": ["q"], "completion": ["a"]})
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with pa.ipc.new_stream(tmp_path / split / "data-00000-of-00001.arrow", dataset.schema) as file:
            file.write_table(dataset)
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / split / name).write_text(json.dumps({"citation": "", "features": {}}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder in (tmp_path, tmp_path / "train"):
        with pytest.raises(
            DataError, match=r"a folder of datasets\.save_to_disk, .*\.to_parquet\(FILE\) does for each split"
        ):
            accepted(folder)
    dataset.to_pandas().to_parquet(tmp_path / "train" / "train.parquet")
    assert accepted(tmp_path) == {("q", "a")}


@pytest.mark.parametrize(
    ("source", "way"),
    [
        ("tatsu-lab/alpaca", "write hf://tatsu-lab/alpaca"),
        ("https://host/x.jsonl", "fetch what lies elsewhere, and name the file here"),
        ("gs://bucket/x.jsonl", "fetch what lies elsewhere, and name the file here"),
        ("file:///x.jsonl", "write the path alone, '/x.jsonl'"),
    ],
)
def test_an_address_that_is_not_read_names_one_that_is(source: str, way: str) -> None:
    with pytest.raises(DataError, match=way):
        find_sources(source)
