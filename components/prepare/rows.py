"""The formats of data files, and their rows, streamed: line by line, element by element, or batch by batch."""

import codecs
import csv
import gzip
import io
import itertools
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from components.prepare import icd10
from components.shared.errors import DataError

T = TypeVar("T")
# The formats of data files by the ending of their name, and their bytes, unpacked.

Kind = Literal["lines", "json", "csv", "parquet"]

KINDS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
PACKED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
FIRST = (".jsonl", ".ndjson", ".parquet")
"""Endings that take precedence: if a folder has files with one of these, its other files are not data."""
ENDINGS = f"a name ending in {', '.join(KINDS)}, each also with .gz or .zst"

WAYS = {
    ".xlsx": "save the sheet as CSV (UTF-8)", ".xls": "save the sheet as CSV (UTF-8)", ".ods": "save the sheet as CSV",
    ".arrow": "write it as Parquet, as datasets.load_from_disk(FOLDER).to_parquet(FILE) does for each split",
    ".feather": "write it as Parquet, as pandas.read_feather(FILE).to_parquet(FILE) does",
    ".zip": "unpack it", ".bz2": "unpack it", ".xz": "unpack it", ".tar": "unpack it",
}  # fmt: skip
"""What to do with a file of another format, by its ending."""


def expected(name: str) -> str:
    """The endings that data files have, and what to do with a file of this name, which has another."""
    way = WAYS.get(PurePosixPath(name.lower()).suffix)
    return f"expected {ENDINGS}{f'; {way}' if way else ''}"


class Form(NamedTuple):
    """The form of a data file, by its name."""

    kind: Kind
    ending: str
    packed: str
    """The compression: gzip, zstd or empty for none."""


def form_of(name: str) -> Form | None:
    """The form of the file with this name; None if it is not a data file."""
    path = PurePosixPath(name.lower())
    packed = PACKED.get(path.suffix, "")
    ending = PurePosixPath(path.stem).suffix if packed else path.suffix
    return Form(KINDS[ending], ending, packed) if ending in KINDS else None


def opened(path: Path, packed: str) -> BinaryIO:
    """The file's bytes, unpacked as they are read. Raises OSError: it cannot be opened."""
    if packed == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if packed == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


# Rows as they were read, before any validation.

ROWS_AT_ONCE, BYTES_AT_ONCE = 4096, 2**19
"""Approximate bounds on a batch of rows: their number, and their bytes."""
MAX_LINE_BYTES = 16 * 2**20
"""Bound on a line of JSON or a cell of CSV, its end included: several times the longest context of any model."""
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = ",;\t|"
SAVE_AS_UTF_8 = (
    "Save it as UTF-8: of a file from Windows or in Latin-1 iconv -f CP1252 -t UTF-8 does so, and Excel as CSV UTF-8"
)


class Unreadable(NamedTuple):
    """Stands in for a row that could not even be parsed."""

    reason: str


class SourceRow(NamedTuple):
    """One row with where it came from."""

    line: int
    """1-based: the line of a JSONL or CSV file (blank ones count), the row of anything else."""
    value: object
    """The parsed value, or `Unreadable`."""
    raw: bytes | None = None
    """The line as it was read; None where there is none."""


class Rows(NamedTuple):
    """Some rows of one file, in order."""

    rows: list[SourceRow]
    unread_columns: tuple[str, ...] = ()
    """Columns that the rows have and their values leave out, because no record needs them."""


Wanted = Callable[[Collection[str]], Collection[str]]
"""A function that is given a file's columns and returns those to read."""


def read_rows(name: str, path: Path | None, *, wanted: Wanted) -> Iterator[Rows]:
    """Stream the rows of the source of this name, whose local file is at `path`; None is the example. Blank lines are
    skipped. Raises DataError: the file cannot be opened, or is not what its name says."""
    if path is None:
        yield from together(SourceRow(line, row) for line, row in enumerate(icd10.rows(name), start=1))
        return
    form = form_of(name)
    assert form is not None
    try:
        if form.kind == "parquet":
            yield from _read_parquet(path, name, form, wanted)
        else:
            yield from together(_read_text(path, name, form))
    except (EOFError, zlib.error) as exc:
        raise DataError(f"data.source {name} cannot be unpacked: {exc}") from exc
    except OSError as exc:
        raise DataError(f"data.source {name} cannot be read: {exc.strerror or exc}") from exc


def together(rows: Iterable[SourceRow]) -> Iterator[Rows]:
    """Group rows that come one by one into batches, small enough that few are in memory."""

    def size(row: SourceRow) -> int:
        return len(str(row.value) if row.raw is None else row.raw)

    return map(Rows, in_batches(rows, size, most=ROWS_AT_ONCE, most_size=BYTES_AT_ONCE))


def in_batches(
    items: Iterable[T], size_of: Callable[[T], int], *, most: float = math.inf, most_size: int
) -> Iterator[list[T]]:
    """The items in batches, which end with the one that makes them `most` items, or `most_size` large."""
    batch, size = list[T](), 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if len(batch) >= most or size >= most_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_text(path: Path, name: str, form: Form) -> Iterator[SourceRow]:
    with opened(path, form.packed) as file:
        first, follows = file.readline(MAX_LINE_BYTES), file.read(4096).strip()
    if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"data.source {name} is UTF-16: save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does")
    first = first.removeprefix(_BOM).strip()
    begins = (first + follows)[:4096]
    with opened(path, form.packed) as file:
        if form.kind == "csv":
            with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                yield from _read_csv(text, name, tabs=form.ending == ".tsv")
        # The file is one list of objects; a line that is a list of anything else is a bad row.
        elif begins.startswith(b"[") and begins[1:].lstrip()[:1] in (b"{", b"]", b""):
            yield from _read_document(file, name)
        elif form.kind == "lines" or (follows and isinstance(_parse(first), dict)):
            yield from _read_json_lines(file)
        else:
            yield from _read_document(file, name)


def _read_json_lines(file: BinaryIO) -> Iterator[SourceRow]:
    for line in itertools.count(1):
        raw = rest = file.readline(MAX_LINE_BYTES)
        while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if not raw:
            return
        raw = raw.removeprefix(_BOM) if line == 1 else raw
        if raw and not raw.isspace():
            yield SourceRow(line, _parse(raw), raw)


def _parse(raw: bytes) -> object:
    if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
        return Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return _with_names(json.loads(raw.rstrip(b"\r\n").decode()))
    except UnicodeDecodeError as exc:
        return Unreadable(f"not UTF-8 at byte {exc.start + 1}")
    except json.JSONDecodeError as exc:
        if exc.msg == "Extra data" and exc.doc.startswith("{", exc.pos):
            return Unreadable(f"another object begins at column {exc.colno}: write each on a line of its own")
        return Unreadable(f"not JSON: {exc.msg} at column {exc.colno}")
    except ValueError as exc:  # a whole number with thousands of digits
        return Unreadable(f"not JSON: {exc}")
    except RecursionError:
        return Unreadable("not JSON: nested too deeply")


def _with_names(value: object) -> object:
    """The value, or `Unreadable` where the name of a column cannot be encoded."""
    try:
        if isinstance(value, dict):
            names = "".join(value)
            names.isascii() or names.encode()
    except UnicodeEncodeError as exc:  # from an escape such as \ud800, which JSON lets pass
        return Unreadable(f"a column's name is not valid Unicode: lone surrogate {exc.object[exc.start]!r}")
    return value


def _read_document(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    """The elements of one JSON list, or of the one list of objects that a JSON object holds."""
    try:
        text = file.read().decode("utf-8-sig")
        start = len(text) - len(text.lstrip())
        if text.startswith("[", start):
            yield from _elements(text, start + 1)
            return
        document = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as exc:
        raise DataError(f"data.source {name} is not UTF-8 at byte {exc.start + 1}. {SAVE_AS_UTF_8}") from exc
    except (ValueError, RecursionError) as exc:
        way = "; write each object on a line of its own" if "Extra data" in str(exc) else ""
        raise DataError(f"data.source {name} is not JSON: {exc}{way}") from exc
    rows = [document] if document else []
    if isinstance(document, dict) and not {"messages", "conversations"} & document.keys():
        lists = [value for value in document.values() if isinstance(value, list) and value]
        of_objects = [values for values in lists if all(isinstance(value, dict) for value in values)]
        rows = of_objects[0] if len(of_objects) == 1 else rows
    yield from (SourceRow(line, _with_names(row)) for line, row in enumerate(rows, start=1))


def _elements(text: str, place: int) -> Iterator[SourceRow]:
    """Yield the elements one by one, so that they are never all in memory as objects."""
    decoder, row = json.JSONDecoder(), 0
    place = _after_space(text, place)
    while not text.startswith("]", place):
        value, place = decoder.raw_decode(text, place)
        row += 1
        yield SourceRow(row, _with_names(value))
        place = _after_space(text, place)
        if text.startswith(",", place):
            place = _after_space(text, place + 1)
        elif not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if rest := text[place + 1 :].strip():
        raise json.JSONDecodeError(f"Something follows the list: {rest[:20]!r}", text, place + 1)


def _after_space(text: str, place: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, place)).end()


def _read_csv(text: io.TextIOWrapper, name: str, *, tabs: bool) -> Iterator[SourceRow]:
    """Read a CSV file whose first row names the columns. Every cell is text; an empty one reads like a missing column.

    With `tabs` cells are divided by tabs, else by the delimiter that is most frequent in the header. Raises DataError:
    the header names a column twice, or a quotation mark is never closed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    first, before = text.readline(), 0
    delimiter = "\t" if tabs else max(_DELIMITERS, key=first.count)
    if named := re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE):  # as Excel writes it
        first, before, delimiter = text.readline(), 1, named[1]
    rows = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    header: list[str] = []
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
        if not header:
            header = [cell.strip() for cell in cells]
            if twice := [cell for place, cell in enumerate(header) if cell in header[:place]]:
                raise DataError(f"data.source {name} has two columns {twice[0]!r}: give each a name of its own")
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


def _read_parquet(path: Path, name: str, form: Form, wanted: Wanted) -> Iterator[Rows]:
    with tempfile.NamedTemporaryFile(prefix="fineloop-source-", suffix=".parquet") as whole:
        if form.packed:
            with opened(path, form.packed) as packed:
                shutil.copyfileobj(packed, whole)
            whole.flush()
        try:
            with pq.ParquetFile(whole.name if form.packed else path) as file:
                names = file.schema_arrow.names
                read = wanted(names)
                unread = tuple(column for column in names if column not in read)
                columns, line = [column for column in names if column in read], 1
                # Without Arrow's own threads: one that runs out of memory ends the process, while ours raises.
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
                    size = max(1, len(batch) * BYTES_AT_ONCE // max(BYTES_AT_ONCE, batch.nbytes))
                    for start in range(0, len(batch), size):
                        rows = [SourceRow(*numbered) for numbered in enumerate(_values(batch.slice(start, size)), line)]
                        yield Rows(rows, unread)
                        line += len(rows)
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
