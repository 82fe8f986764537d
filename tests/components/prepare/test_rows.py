import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.prepare import rows
from components.prepare.rows import Unreadable, read_rows
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from components.store.store import Store


def read(name: str) -> list[tuple[int, object]]:
    (source,) = find_sources(name)
    return [(row.line, row.value) for row in read_rows(source)]


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
    rows: list[dict[str, object]] = [
        {"id": "1", "messages": [{"role": "user", "content": "a"}], "prompt": None},
        {"id": None, "messages": None, "prompt": "b"},
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "embedding": [0.5]} for row in rows]), path)
    (source,) = find_sources(str(path))
    first, second = read_rows(source)
    assert (first.line, first.value) == (1, {"id": "1", "messages": [{"role": "user", "content": "a"}]})
    assert (second.line, second.value) == (2, {"prompt": "b"})
    assert first.unread_columns == ("embedding",)
    assert next(read_rows(source, group="embedding")).value == {**first.value, "embedding": [0.5]}


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(10_000)]}), path, row_group_size=3000)
    rows = read(str(path))
    assert rows[0] == (1, {"prompt": "0"})
    assert rows[-1] == (10_000, {"prompt": "9999"})
    assert len(rows) == 10_000


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
    (source,) = find_sources(name)
    Path(name).unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: No such file"):
        list(read_rows(source))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_s3_objects_are_read_like_local_files(store: Store, tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    local = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), local)
    else:
        local.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.put(f"incoming/{name}", local)
    assert read(store.uri(f"incoming/{name}")) == [(1, rows[0]), (2, rows[1])]
