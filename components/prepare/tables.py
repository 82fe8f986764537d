"""Reads the rows of tables: CSV row by row, Parquet batch by batch. An empty cell reads like a missing column."""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from components.prepare.row import BYTES_AT_ONCE, ROWS_AT_ONCE, Rows, SourceRow, Unreadable, Wanted
from components.shared.errors import DataError

_DELIMITERS = ",;\t|"


def read_csv(file: BinaryIO, name: str, *, tabs: bool, max_cell: int) -> Iterator[SourceRow]:
    """Read a CSV file whose first row names the columns. Every cell is text.

    With `tabs` cells are divided by tabs, else by the delimiter that is most frequent in the header.

    Raises:
        DataError: the header names a column twice, or a quotation mark is never closed.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_rows(text, name, tabs=tabs, max_cell=max_cell)
    finally:
        text.detach()  # whoever opened the file closes it


def _csv_rows(text: io.TextIOWrapper, name: str, *, tabs: bool, max_cell: int) -> Iterator[SourceRow]:
    csv.field_size_limit(max_cell)
    first, before = text.readline(), 0
    delimiter = "\t" if tabs else max(_DELIMITERS, key=first.count)
    if named := re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE):  # as Excel writes it
        first, before, delimiter = text.readline(), 1, named[1]
    rows = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1 + before
        try:
            cells = next(rows, None)
        except csv.Error as exc:
            if "unexpected end" in str(exc):
                raise DataError(
                    f"data.source {name} opens a quotation mark in line {line} and never closes it"
                ) from exc
            yield SourceRow(line, Unreadable(f"not CSV: {exc}"))
            continue
        if cells is None:
            return
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                twice = next(cell for cell in header if header.count(cell) > 1)
                raise DataError(f"data.source {name} has two columns {twice!r}: give each a name of its own")
        elif cells:
            yield _csv_row(line, cells, header, delimiter)


def _csv_row(line: int, cells: list[str], header: list[str], delimiter: str) -> SourceRow:
    raw = delimiter.join(cells).encode(errors="surrogateescape")
    try:
        raw.decode()
    except UnicodeDecodeError as exc:
        return SourceRow(line, Unreadable(f"not UTF-8 at byte {exc.start + 1}"), raw)
    if len(cells) != len(header):
        return SourceRow(line, Unreadable(f"{len(cells)} cells where the header has {len(header)}"), raw)
    return SourceRow(line, {name: cell for name, cell in zip(header, cells, strict=True) if cell}, raw)


def read_parquet(path: Path, name: str, wanted: Wanted) -> Iterator[Rows]:
    """The rows of a Parquet file with the columns that are wanted.

    Raises:
        DataError: it cannot be read as a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            read = wanted(names)
            known = [column for column in names if column in read]
            unread = tuple(column for column in names if column not in read)
            line = 1
            # Without Arrow's own threads: one that runs out of memory ends the process, while ours raises.
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=known, use_threads=False):
                size = max(1, len(batch) * BYTES_AT_ONCE // max(BYTES_AT_ONCE, batch.nbytes))
                for start in range(0, len(batch), size):
                    values = list(_values(batch.slice(start, size)))
                    yield Rows(range(line, line + len(values)), values, None, unread)
                    line += len(values)
    except MemoryError:  # Arrow's own MemoryError is an ArrowException too
        raise
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"data.source {name} cannot be read as Parquet: {exc}") from exc


def _values(batch: Any) -> Iterator[object]:
    """The batch as objects without their nulls, so that a null cell reads like a missing one."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a time outside Python's range
        rows = [_value(batch.slice(index, 1)) for index in range(batch.num_rows)]
    for row in rows:
        yield row if isinstance(row, Unreadable) else {name: cell for name, cell in row.items() if cell is not None}


def _value(one_row: Any) -> object:
    try:
        return one_row.to_pylist()[0]
    except UnicodeDecodeError as exc:
        return Unreadable(f"not UTF-8 at byte {exc.start + 1}")
    except (ValueError, OverflowError) as exc:
        return Unreadable(f"a value that cannot be read: {exc}")
