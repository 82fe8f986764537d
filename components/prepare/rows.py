"""The rows of one source, streamed: line by line from JSONL, batch by batch from Parquet."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from components.prepare.sources import EXAMPLES, PARQUET, Source
from components.prepare.validate import KNOWN_COLUMNS
from components.shared.errors import DataError

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 4096
MAX_LINE_BYTES = 16 * 2**20
"""Of a JSONL file, its end included: several times the longest context that any model has."""


class Unreadable(NamedTuple):
    """Stands in for a row that could not even be parsed."""

    reason: str


class SourceRow(NamedTuple):
    """One row with where it came from."""

    line: int
    """1-based: the line of a JSONL file (blank ones count), the row of anything else."""
    value: object
    """What was parsed, or `Unreadable`."""
    raw: bytes | None = None
    """The line itself, where there is one."""
    unread_columns: tuple[str, ...] = ()
    """Columns that the row has and `value` leaves out, because no record needs them."""


def read_rows(source: Source, *, group: str = "") -> Iterator[SourceRow]:
    """Stream the source's rows; blank lines are skipped. `group` is a column to read beside those of a record.

    Raises:
        DataError: the file cannot be opened or is not Parquet.
        StoreError: an s3:// source cannot be read.
    """
    if source.name in EXAMPLES:
        from components.prepare import icd10

        yield from (SourceRow(line, row) for line, row in enumerate(icd10.rows(), start=1))
    elif source.name.startswith("s3://"):
        from components.store.store import open_uri

        store, key = open_uri(source.name, field="data.source")
        with tempfile.TemporaryDirectory(prefix="fineloop-source-") as scratch:
            path = Path(scratch, Path(key).name)
            store.download(key, path)
            yield from _read_file(path, source.name, group)
    else:
        yield from _read_file(Path(source.name), source.name, group)


def _read_file(path: Path, name: str, group: str) -> Iterator[SourceRow]:
    if path.suffix.lower() in PARQUET:
        return _read_parquet(path, name, (*KNOWN_COLUMNS, group))
    return _read_json_lines(path, name)


def _read_json_lines(path: Path, name: str) -> Iterator[SourceRow]:
    try:
        file = path.open("rb")
    except OSError as exc:
        raise DataError(f"data.source {name} cannot be read: {exc.strerror}") from exc
    with file:
        for line, raw in enumerate(_lines(file), start=1):
            if line == 1:
                raw = raw.removeprefix(_BOM)
            if not raw.isspace() and raw:
                yield SourceRow(line, _parse(raw), raw)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Line by line; of one that is too long its beginning, by a byte longer than may be."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        yield line


def _parse(raw: bytes) -> object:
    if len(raw) > MAX_LINE_BYTES:
        return Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode())
        if isinstance(value, dict):
            "".join(value).encode()
    except UnicodeDecodeError as exc:
        return Unreadable(f"not UTF-8 at byte {exc.start + 1}")
    except UnicodeEncodeError as exc:  # from an escape such as \ud800, which JSON lets pass
        return Unreadable(f"a column's name is not valid Unicode: lone surrogate {exc.object[exc.start]!r}")
    except json.JSONDecodeError as exc:
        return Unreadable(f"not JSON: {exc.msg} at column {exc.colno}")
    except ValueError as exc:  # a whole number with thousands of digits
        return Unreadable(f"not JSON: {exc}")
    except RecursionError:
        return Unreadable("not JSON: nested too deeply")
    return value


def _read_parquet(path: Path, name: str, wanted: tuple[str, ...]) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [column for column in wanted if column in names]
            unread = tuple(column for column in names if column not in wanted)
            line = 0
            # Without threads of Arrow's own: one that finds no memory ends the process, where ours raises.
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=known, use_threads=False):
                for value in _values(batch):
                    line += 1
                    yield SourceRow(line, value, None, unread)
    except MemoryError:  # Arrow's is one of its exceptions too
        raise
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"data.source {name} cannot be read as Parquet: {exc}") from exc


def _values(batch: Any) -> Iterator[object]:
    """The batch as objects without their nulls, so that a null cell reads like a missing one."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a time that Python's do not reach
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
