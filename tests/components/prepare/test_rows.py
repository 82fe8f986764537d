import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.train import ColumnsConfig
from components.prepare import rows
from components.prepare.rows import SourceRow, Unreadable
from components.prepare.shapes import columns_read
from components.prepare.sources import find_sources, local_copies
from components.shared.errors import DataError
from components.store.store import Store


def read_rows(name: str, *, group: str = "") -> list[SourceRow]:
    return [
        found.row(place)
        for source, path in local_copies(find_sources(name))
        for found in rows.read_rows(
            source.name, path, wanted=lambda names: columns_read(names, ColumnsConfig(), group=group)
        )
        for place in range(len(found.lines))
    ]


def read(name: str) -> list[tuple[int, object]]:
    return [(row.line, row.value) for row in read_rows(name)]


def test_lines_are_counted_from_one_and_blank_ones_count_but_give_no_row(write_rows: Callable[..., str]) -> None:
    assert read(write_rows([{"a": 1}, "", "  ", {"a": 2}])) == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_ignored(write_rows: Callable[..., str]) -> None:
    assert read(write_rows([b'\xef\xbb\xbf{"a": 1}\r', b'{"a": 2}\r'])) == [(1, {"a": 1}), (2, {"a": 2})]


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}')
    assert read(str(path)) == [(1, {"a": 1})]


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
def test_a_line_that_cannot_be_parsed_carries_its_reason(
    line: bytes, reason: str, write_rows: Callable[..., str]
) -> None:
    (_, first), second = read(write_rows([line, {"a": 2}]))
    assert isinstance(first, Unreadable)
    assert first.reason.startswith(reason)
    assert second == (2, {"a": 2})


def test_a_line_that_is_too_long_spoils_only_itself(
    write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
    long, longest = ('{"a": "' + "x" * size + '"}' for size in (990, 991))
    found = read(write_rows([longest, {"a": 2}, "y" * 5000, long, {"a": 3}]))
    assert [line for line, _ in found] == [1, 2, 3, 4, 5]
    too_long = Unreadable("the line is longer than 0 MiB")
    assert [value for _, value in found] == [too_long, {"a": 2}, too_long, {"a": "x" * 990}, {"a": 3}]


def test_parquet_gives_the_same_rows_as_jsonl_without_nulls(tmp_path: Path) -> None:
    given: list[dict[str, object]] = [
        {"id": "1", "messages": [{"role": "user", "content": "a"}], "prompt": None},
        {"id": None, "messages": None, "prompt": "b"},
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "embedding": [0.5]} for row in given]), path)
    first, second = read_rows(str(path))
    assert (first.line, first.value) == (1, {"id": "1", "messages": [{"role": "user", "content": "a"}]})
    assert (second.line, second.value) == (2, {"prompt": "b"})
    assert first.unread_columns == ("embedding",)
    assert read_rows(str(path), group="embedding")[0].value == {**first.value, "embedding": [0.5]}


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(10_000)]}), path, row_group_size=3000)
    found = read(str(path))
    assert found[0] == (1, {"prompt": "0"})
    assert found[-1] == (10_000, {"prompt": "9999"})
    assert len(found) == 10_000


def test_text_in_parquet_that_is_not_utf8_spoils_only_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    text = pa.array([b"good", b"ab\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), path)
    assert read(str(path)) == [(1, {"prompt": "good"}), (2, Unreadable("not UTF-8 at byte 3")), (3, {"prompt": "fine"})]


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        read(str(path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [str(i) * 50 for i in range(5000)]}), path, use_dictionary=False)
    body = bytearray(path.read_bytes())
    body[4:2000] = bytes(1996)
    path.write_bytes(body)
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
        path.write_bytes(
            gzip.compress(body, mtime=0) if path.suffix == ".gz" else bytes(pa.compress(body, "zstd", asbytes=True))
        )
        plain.unlink()


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows_packed_or_not(ending: str, packed: str, tmp_path: Path) -> None:
    write(ROWS, tmp_path / f"a{ending}{packed}")
    assert [value for _, value in read(str(tmp_path / f"a{ending}{packed}"))] == ROWS
    assert [value for _, value in read(str(tmp_path))] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_as_what_it_is(name: str, indent: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\ufeff \n" + json.dumps(ROWS, indent=indent) + "\n")
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
def test_a_file_that_is_damaged_is_refused_and_not_read_in_part(
    name: str, body: bytes, message: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv.gz", "a.parquet.zst"])
@pytest.mark.parametrize("one_request_bytes", [0, 2**20])
def test_s3_objects_are_read_like_local_files(
    store: Store, tmp_path: Path, name: str, one_request_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.prepare.sources.ONE_REQUEST_BYTES", one_request_bytes)
    write(ROWS, tmp_path / name)
    store.put(f"incoming/{name}", tmp_path / name)
    assert [value for _, value in read(store.uri(f"incoming/{name}"))] == ROWS
    assert [value for _, value in read(store.uri("incoming/"))] == ROWS


def test_files_in_a_bucket_are_read_in_order_by_one_client_some_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        store.put(f"incoming/{number:02}.jsonl", json.dumps({"prompt": number}).encode() + b"\n")
    opened: list[str] = []
    monkeypatch.setattr("components.store.store.client_from_environment", _counting(opened))
    sources = find_sources(store.uri("incoming/"))
    copies = local_copies(sources)
    paths = []
    for number, (source, path) in enumerate(copies):
        assert source == sources[number]
        assert path is not None
        assert json.loads(path.read_text()) == {"prompt": number}
        paths.append(path)
        assert not any(each.exists() for each in paths[:-1])
    assert len(paths) == 12
    assert len(opened) == 2  # one to list, one to read
    stopped = local_copies(sources)
    _, first = next(stopped)
    stopped.close()
    assert first is not None
    assert not first.exists()


def _counting(opened: list[str]) -> Callable[[], Any]:
    from components.store.client import client_from_environment

    def counted() -> Any:
        opened.append("client")
        return client_from_environment()

    return counted


def test_no_line_goes_on_in_the_next_one(write_rows: Callable[..., str]) -> None:
    found = read(write_rows(['{"a": [1', "2]}", '{"b": 1}, {"b": 2}', {"c": 1}]))
    assert [isinstance(value, Unreadable) for _, value in found] == [True, True, True, False]
