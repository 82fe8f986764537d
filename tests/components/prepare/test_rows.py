import codecs
import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.train import ColumnsConfig
from components.prepare import rows
from components.prepare.dataset import Record
from components.prepare.personal import Screen, find
from components.prepare.prepare import require_usable
from components.prepare.rows import SourceRow, Unreadable
from components.prepare.shapes import columns_read
from components.prepare.sources import find_sources, local_copies
from components.shared.errors import DataError
from components.store.store import Store
from tests.doubles.datasets import read as read_validated


def source_rows(name: str, *, group: str = "") -> list[SourceRow]:
    return [
        row
        for source, path in local_copies(find_sources(name))
        for found in rows.read_rows(source.name, path, wanted=lambda names: columns_read(names, ColumnsConfig(), group))
        for row in found.rows
    ]


def read(name: str) -> list[tuple[int, object]]:
    return [(row.line, row.value) for row in source_rows(name)]


def test_lines_are_counted_from_one_and_blank_ones_count_but_give_no_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}\r\n{"a": 3}')
    assert read(str(path)) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "caf\xe9"}', "not UTF-8 at byte 11"),
        (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b"plain text", "not JSON: Expecting value at column 1"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b"1" * 5000, "not JSON: Exceeds the limit"),
        (rb'{"prompt": "a", "\ud800": 1}', r"a column's name is not valid Unicode: lone surrogate '\ud800'"),
    ],
)
def test_a_line_that_cannot_be_parsed_carries_its_reason(line: bytes, reason: str, write_rows) -> None:
    (_, first), second = read(write_rows([line, {"a": 2}]))
    assert isinstance(first, Unreadable)
    assert first.reason.startswith(reason)
    assert second == (2, {"a": 2})


def test_a_line_that_is_too_long_spoils_only_itself(write_rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    long, longest = ('{"a": "' + "x" * size + '"}' for size in (990, 991))
    too_long = Unreadable("the line is longer than 0 MiB")
    read_back = [too_long, {"a": 2}, too_long, {"a": "x" * 990}, {"a": 3}]
    assert read(write_rows([longest, {"a": 2}, "y" * 5000, long, {"a": 3}])) == [*enumerate(read_back, 1)]


def test_parquet_gives_the_same_rows_as_jsonl_without_nulls(tmp_path: Path) -> None:
    given: list[dict[str, object]] = [
        {"id": "1", "messages": [{"role": "user", "content": "a"}], "prompt": None},
        {"id": None, "messages": None, "prompt": "b"},
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "embedding": [0.5]} for row in given]), path)
    first = {"id": "1", "messages": [{"role": "user", "content": "a"}]}
    assert read(str(path)) == [(1, first), (2, {"prompt": "b"})]
    assert source_rows(str(path), group="embedding")[0].value == {**first, "embedding": [0.5]}
    (found,) = rows.read_rows(path.name, path, wanted=lambda names: ["prompt"])
    assert found.unread_columns == ("id", "messages", "embedding")


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(10_000)]}), path, row_group_size=3000)
    assert read(str(path)) == [(number + 1, {"prompt": str(number)}) for number in range(10_000)]


def test_text_in_parquet_that_is_not_utf8_spoils_only_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    text = pa.array([b"good", b"ab\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), path)
    assert read(str(path)) == [(1, {"prompt": "good"}), (2, Unreadable("not UTF-8 at byte 3")), (3, {"prompt": "fine"})]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [str(i) * 50 for i in range(5000)]}), path, use_dictionary=False)
    body = bytearray(path.read_bytes())
    body[4:2000] = bytes(1996)
    for damaged in (body, b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
            read(str(path))


def test_a_file_that_may_not_be_opened_is_refused(write_rows: Callable[..., str]) -> None:
    name = write_rows([{"a": 1}])
    Path(name).unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: No such file"):
        list(rows.read_rows(name, Path(name), wanted=lambda names: names))


ROWS = [{"id": "1", "prompt": 'caf\u00e9, "a"\n2', "completion": "b"}, {"id": "2", "prompt": "c", "completion": "d"}]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """By other libraries than those that read: pandas writes tables, and the command line's tools pack."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    table = pd.DataFrame(rows)
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif plain.suffix == ".json":
        table.to_json(plain, orient="records", indent=2)
    elif plain.suffix == ".parquet":
        table.to_parquet(plain)
    else:
        table.to_csv(plain, index=False, sep="\t" if plain.suffix == ".tsv" else ",")
    if path != plain:
        body = plain.read_bytes()
        packed = gzip.compress(body, mtime=0) if path.suffix == ".gz" else pa.compress(body, "zstd", asbytes=True)
        path.write_bytes(packed)
        plain.unlink()


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.tsv.gz", "a.json.zst", "a.parquet.zst"],
)
def test_every_format_gives_the_same_rows_packed_or_not(name: str, tmp_path: Path) -> None:
    write(ROWS, tmp_path / name)
    assert [value for _, value in read(str(tmp_path / name))] == ROWS
    assert [value for _, value in read(str(tmp_path))] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=str)
def test_a_json_array_is_read_as_what_it_is(name: str, form: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text("\ufeff \n" + json.dumps(ROWS, **form) + "\n")
    assert read(str(tmp_path / name)) == [(1, ROWS[0]), (2, ROWS[1])]
    (tmp_path / name).write_text("[ ]")
    assert read(str(tmp_path / name)) == []


def test_a_json_file_of_lines_is_read_line_by_line_and_one_object_for_the_list_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0]) + "\nno JSON\n" + json.dumps(ROWS[1]))
    assert [line for line, _ in read(str(path))] == [1, 2, 3]
    path.write_text(json.dumps({"version": "1", "data": ROWS}, indent=2))
    assert read(str(path)) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert read(str(path)) == [(1, ROWS[0])]


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.json", b'[{"a": 1}, {"a": ', r"a\.json is not JSON: Expecting value: line 1 column 18"),
        ("a.jsonl", b'[{"a": 1} {"a": 2}]', r"a\.jsonl is not JSON: Expecting ',' or '\]': line 1 column 11"),
        ("a.json", b'[{"a": 1}] x', r"Something follows the list: 'x'"),
        ("a.json", '[{"a": "caf\u00e9"}]'.encode("latin-1"), r"not UTF-8 at byte 12"),
        ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz cannot be unpacked"),
        ("a.csv.zst", b"hello", r"a\.csv\.zst cannot be read: ZSTD decompress failed"),
        ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', r"a\.csv opens a quotation mark in line 3 and never closes it"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv has two columns 'a'"),
    ],
)
def test_a_file_that_is_damaged_is_refused_and_not_read_in_part(name: str, body, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name))


def test_rows_of_csv_are_bad_one_by_one_and_their_header_shows_what_divides_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt;completion\r\n"a\r\nb";"c;d"\r\n\r\ne\r\n;x\r\ncaf\xe9;y\r\n"q"r;z\r\nf;g\r\n'
    )
    assert read(str(path)) == [
        (2, {"prompt": "a\r\nb", "completion": "c;d"}),
        (5, Unreadable("1 cells where the header has 2")),
        (6, {"completion": "x"}),
        (7, Unreadable("not UTF-8 at byte 4")),
        (8, Unreadable("not CSV: ';' expected after '\"'")),
        (9, {"prompt": "f", "completion": "g"}),
    ]


@pytest.mark.parametrize(("name", "one_request_bytes"), [("a.jsonl", 0), ("a.parquet", 2**20), ("a.parquet.zst", 0)])
def test_s3_objects_are_read_like_local_files(store, tmp_path, name: str, one_request_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr("components.prepare.sources.ONE_REQUEST_BYTES", one_request_bytes)
    write(ROWS, tmp_path / name)
    store.put(f"incoming/{name}", tmp_path / name)
    assert [value for _, value in read(store.uri(f"incoming/{name}"))] == ROWS
    assert [value for _, value in read(store.uri("incoming/"))] == ROWS


def test_files_in_a_bucket_are_read_in_order_and_none_is_kept(store: Store) -> None:
    for number in range(12):
        store.put(f"incoming/{number:02}.jsonl", json.dumps({"prompt": number}).encode() + b"\n")
    sources = find_sources(store.uri("incoming/"))
    paths = []
    for number, (source, path) in enumerate(local_copies(sources)):
        assert source == sources[number]
        assert json.loads(path.read_text()) == {"prompt": number}
        paths.append(path)
        assert not any(each.exists() for each in paths[:-1])
    assert len(paths) == 12


# The files that people have: each is taken as it is, or the refusal names the way in which it would be.

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE_GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
HUMAN = [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]
PLAIN = {"prompt": "q", "completion": "a"}


def lines_of(*rows: Any, count: int = 20) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows * count).encode()


def accepted(path: Path, **columns: Any) -> set[tuple[str, str]]:
    """What is asked and answered in the file's records; DataError where a run would stop."""
    named = ColumnsConfig(**columns)
    found = read_validated(find_sources(str(path)), columns=named)
    require_usable(found.counts, max_reject_share=0.05, columns=named)
    return {(each.record.prompt[-1].content, each.record.answer) for each in found.accepted}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("windows.jsonl", b"\xef\xbb\xbf" + lines_of(PLAIN).replace(b"\n", b"\r\n")),
        ("dirt.jsonl", lines_of(PLAIN, count=100) + b'{"prompt": "q", "completion": null}\n' + b"{broken\n"),
        ("openai.jsonl", lines_of({"messages": PARTS})),
        ("response.jsonl", lines_of({"prompt": "q", "response": "a", "model": "m"})),
        ("capitals.jsonl", lines_of({"Prompt": "q", "Completion": "a"})),
        ("speakers.jsonl", lines_of({"user": "q", "assistant": "a"})),
        ("input.csv", b"Input,Output\nq,a\n"),
        ("excel.csv", b"sep=;\r\nprompt;completion\r\nq;a\r\n"),
        ("one line.json", json.dumps({"data": [PLAIN] * 500}).encode()),
        ("lines.json", lines_of({**PLAIN, "x": "x" * 9000})),
    ],
)
def test_a_file_is_taken_as_it_is(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert accepted(path) == {("q", "a")}


@pytest.mark.parametrize(
    ("row", "advice", "columns"),
    [
        ({"prompt": "q", "response": "a", "input": "", "output": "b"}, "completion=output", {"completion": "response"}),
        ({"Ask": "q", "Reply": "a"}, "prompt=COLUMN .*completion=Reply", {"prompt": "Ask", "completion": "Reply"}),
        ({"request": "q", "response": "a"}, "prompt=request", {"prompt": "request", "completion": "response"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "data.columns.completion=chosen", {"completion": "chosen"}),
        ({"messages": HUMAN}, "data.columns.messages=messages reads such turns", {"messages": "messages"}),
        ({"messages": SHARE_GPT}, "data.columns.messages=messages reads such turns", {"messages": "messages"}),
    ],
)
def test_the_advice_of_a_refusal_is_one_that_works(row, advice: str, columns: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines_of(row))
    with pytest.raises(DataError, match=advice):
        accepted(path)
    assert accepted(path, **columns) == {("q", "a")}


JOINED = lines_of(PLAIN).replace(b"\n", b" ")


@pytest.mark.parametrize(
    ("name", "content", "way"),
    [
        ("nulls.jsonl", lines_of(*[PLAIN] * 9, {**PLAIN, "completion": None}), "Fix these rows or raise data.max_rej"),
        ("text.jsonl", lines_of({"text": "q a"}), "write prompt and completion apart"),
        ("latin.jsonl", lines_of(PLAIN).replace(b'"q"', b'"\xe4"'), "iconv -f CP1252 -t UTF-8 does so"),
        ("windows.json", '[{"prompt": "“q”"}]'.encode("cp1252"), r"not UTF-8 at byte 14\. Save it as UTF-8: .* CP1252"),
        ("split.json", json.dumps({"train": [PLAIN], "test": [PLAIN]}).encode(), "found 'train', 'test'"),
        ("pandas.json", pd.DataFrame([PLAIN] * 3).to_json().encode(), "1 x prompt is an object: expected text"),
        ("joined.jsonl", JOINED, "another object begins at column 36: write each on a line of"),
        ("joined.json", JOINED, "is not JSON: Extra data.*; write each object on a line of its"),
        ("bare.csv", b"Mpox,Infections\nStye,Eye\n" * 9, "Where the first row holds data, write one with the"),
        ("utf16.jsonl", lines_of(PLAIN).decode().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("utf16.csv", codecs.BOM_UTF16_BE + "prompt,completion\nq,a\n".encode("utf-16-be"), "is UTF-16"),
        ("rows.xlsx", b"PK", r"expected a name ending in \.jsonl.*; save the sheet as CSV \(UTF-8\)"),
        ("rows.zip", b"PK", "; unpack it"),
        ("data.arrow", b"ARROW1", r"; write it as Parquet, as datasets\.load_from_disk\(FOLDER\)\.to_parquet\(FILE\)"),
    ],
)
def test_what_no_config_reads_is_refused_with_what_to_do_about_it(name, content: bytes, way: str, tmp_path) -> None:
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
        with pytest.raises(DataError, match=r"a folder of datasets\.save_to_disk, .*\.to_parquet"):
            accepted(folder)
    dataset.to_pandas().to_parquet(tmp_path / "train" / "train.parquet")
    assert accepted(tmp_path) == {("q", "a")}


# Rows that are taken together become what each becomes by itself.


def test_rows_read_together_are_records_or_rejects_by_their_lines(write_rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.prepare.rows.BYTES_AT_ONCE", 500)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    kinds: list[tuple[Any, str]] = [
        ({"prompt": "write to", "completion": "ann@example.com", "g": "u"}, "withheld"),
        ({"prompt": "q", "completion": "Zoë", "g": 3}, ""),
        ({"instruction": "q", "input": "i", "output": "a", "g": "v"}, ""),
        ({"messages": turns, "g": "é"}, ""),
        ({"prompt": "q", "completion": " ", "g": "u"}, "completion is empty"),
        ({"messages": turns}, "g is missing"),
        (["x"], "row is a list: expected an object with prompt and completion, or messages"),
    ]
    given = random.Random(0).choices(kinds, k=2000)
    found = read_validated(find_sources(write_rows([row for row, _ in given])), group="g", personal="drop")
    reasons = [(line, outcome) for line, (_, outcome) in enumerate(given, 1) if outcome not in ("", "withheld")]
    assert [(each.line, each.reason.partition(" (a list")[0]) for each in found.rejects] == reasons
    groups = [str(row["g"]) for row, outcome in given if outcome == ""]
    assert [each.record.group for each in found.accepted] == groups
    outcomes = [outcome for _, outcome in given]
    total = found.counts.total
    assert (total.rows, total.withheld, total.accepted) == (2000, outcomes.count("withheld"), len(groups))
    assert found.counts.unread == {"messages[].reasoning_content": sum("messages" in row for row, _ in given)}


def test_rows_of_parquet_become_what_those_of_json_lines_do(tmp_path: Path, write_rows, monkeypatch) -> None:
    monkeypatch.setattr("components.prepare.rows.BYTES_AT_ONCE", 999)
    rng = random.Random(0)
    rows = []
    for number in range(500):
        answer = {"role": "assistant", "content": rng.choice(["a ", "b", "", "ü"])}
        turns = [{"role": "user", "content": f"q{number}"}, answer]
        rows.append({"id": rng.choice([None, str(number)]), "messages": turns})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    one, other = (read_validated(find_sources(name)) for name in (str(tmp_path / "x.parquet"), write_rows(rows)))
    assert one.accepted == other.accepted
    assert [(each.line, each.reason) for each in one.rejects] == [(each.line, each.reason) for each in other.rejects]


def suspects(*texts: str) -> list[int]:
    return Screen().suspects({place: Record("r", [], text) for place, text in enumerate(texts)})


def test_no_text_with_personal_data_is_passed_over() -> None:
    lines = Path(__file__).with_name("personal.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts += ["Zoë 🤦🏼‍♂️ 傷", "+49 30 901820, or 2024-01-02 03:04", "٠١٢٣٤٥٦٧٨"]
    found = [place for place, text in enumerate(texts) if find(text, regions=["DE", "US", "GB"])]
    assert {*found} <= {*suspects(*texts)}
    digits = [chr(each) for each in range(sys.maxunicode + 1) if chr(each).isdecimal()]
    assert len(suspects(*(each + "12 34" + each + "56" for each in digits))) == len(digits)
    assert not suspects("Why is the sky blue?", "risk-free, right through the night", "12 + 34 = 46", "at 5 @ home")


def test_a_document_is_read_or_refused_however_deeply_it_is_nested(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "x.json", []
    for depth in range(900, 1000):
        path.write_text('[{"prompt": "q", "completion": "a", "x": ' + "[" * depth + "]" * depth + "}]")
        try:
            outcomes.append(len(read_validated(find_sources(str(path))).accepted))
        except DataError:
            outcomes.append(0)
    assert set(outcomes) == {0, 1}
