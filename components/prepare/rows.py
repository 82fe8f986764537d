"""The rows of one file, streamed: line by line, element by element, or batch by batch."""

import codecs
import csv
import io
import itertools
import json
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from components.prepare.formats import Form, form_of, opened
from components.prepare.row import BYTES_AT_ONCE, ROWS_AT_ONCE, Rows, SourceRow, Unreadable, Wanted, together
from components.prepare.sources import EXAMPLES, Source
from components.prepare.validate import has_known_form
from components.shared.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_BEGINNING_BYTES = 4096
SAVE_AS_UTF_8 = (
    "Save it as UTF-8: of a file from Windows or in Latin-1 iconv -f CP1252 -t UTF-8 does so, and Excel as CSV UTF-8"
)
_BETWEEN = secrets.token_hex(16)
_BETWEEN_QUOTED = f',"{_BETWEEN}",'
MAX_LINE_BYTES = 16 * 2**20
"""Bound on a line of JSON or a cell of CSV, its end included: several times the longest context of any model."""


def read_rows(source: Source, path: Path | None, *, wanted: Wanted) -> Iterator[Rows]:
    """Stream the rows of a source whose local file is at `path`, or of the example, whose `path` is None. Blank lines
    are skipped.

    Raises:
        DataError: the file cannot be opened, or is not what its name says.
    """
    if source.name in EXAMPLES:
        from components.prepare import icd10

        yield from together(SourceRow(line, row) for line, row in enumerate(icd10.rows(), start=1))
        return
    form, name = form_of(source.name), source.name
    assert form is not None
    assert path is not None
    try:
        if form.kind == "parquet":
            yield from _read_parquet(path, name, form, wanted)
        else:
            with opened(path, form.packed) as file:
                yield from _read_text(file, name, form)
    except (EOFError, zlib.error) as exc:
        raise DataError(f"data.source {name} cannot be unpacked: {exc}") from exc
    except OSError as exc:
        raise DataError(f"data.source {name} cannot be read: {exc.strerror or exc}") from exc


def _read_text(file: BinaryIO, name: str, form: Form) -> Iterator[Rows]:
    if cast(Any, file).peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"data.source {name} is UTF-16: save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does")
    if form.kind == "csv":
        return together(read_csv(file, name, tabs=form.ending == ".tsv", max_cell=MAX_LINE_BYTES))
    beginning = cast(Any, file).peek(_BEGINNING_BYTES)[:_BEGINNING_BYTES].removeprefix(_BOM).lstrip()
    if _is_array(beginning) or (form.kind == "json" and not _is_lines(file, beginning)):
        return together(_read_document(file, name))
    return _read_json_lines(file)


def _is_array(beginning: bytes) -> bool:
    """Whether the file is one list of objects; a line that is a list of anything else is a bad row."""
    return beginning.startswith(b"[") and beginning[1:].lstrip()[:1] in (b"{", b"]", b"")


def _is_lines(file: BinaryIO, beginning: bytes) -> bool:
    """Whether the first line is a whole object and another line follows, or the line is too long to tell."""
    first, _, rest = beginning.partition(b"\n")
    if not rest.strip() and file.seekable():
        first = file.readline(MAX_LINE_BYTES).removeprefix(_BOM)
        rest = file.read(1) if first.endswith(b"\n") else b""
        file.seek(0)
        return bool(rest) and isinstance(_parse(first), dict)
    return isinstance(_parse(first), dict) if rest.strip() else len(beginning) > _BEGINNING_BYTES // 2


def _read_json_lines(file: BinaryIO) -> Iterator[Rows]:
    first = 1
    for lines in _lines(file):
        numbers = [number for number, raw in enumerate(lines, first) if raw and not raw.isspace()]
        raws = lines if len(numbers) == len(lines) else [lines[number - first] for number in numbers]
        first += len(lines)
        if raws:
            yield Rows(numbers, _parsed_together(raws) or list(map(_parse, raws)), raws)


def _parsed_together(lines: list[bytes]) -> list[Any] | None:
    """The values of lines that each hold one object, in half the time of parsing them one by one; None where any holds
    something else.

    The lines are parsed as one list, with a random text between every two that no file can know: it shows that no value
    extends into the next line.
    """
    try:
        text = _BETWEEN_QUOTED.join([raw.decode() for raw in lines])
        values = json.loads(f"[{text}]")
    except (ValueError, RecursionError):  # UnicodeDecodeError is one of the former
        return None
    found, between = values[::2], values[1::2]
    is_whole = len(found) == len(lines) and between == [_BETWEEN] * (len(lines) - 1)
    if not is_whole or max(map(len, lines)) >= MAX_LINE_BYTES or not all(type(each) is dict for each in found):
        return None
    return list(map(_with_names, found)) if "\\u" in text else found


def _lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield all lines without their ends, in batches; only the beginning of a line that is too long."""
    piece, begun = file.read(BYTES_AT_ONCE).removeprefix(_BOM), b""
    while piece:
        lines = piece.split(b"\n")
        lines[0] = begun + lines[0][: MAX_LINE_BYTES - len(begun)]
        begun = lines.pop()
        if lines:
            yield lines
        piece = file.read(BYTES_AT_ONCE)
    if begun:
        yield [begun]


def _parse(raw: bytes) -> object:
    if len(raw) >= MAX_LINE_BYTES:
        return Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return _with_names(json.loads(raw.rstrip(b"\r").decode()))
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
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    rows = [each for each in lists if each and all(isinstance(row, dict) for row in each)]
    is_record = isinstance(document, dict) and bool({"messages", "conversations"} & set(document))
    if isinstance(document, dict) and _is_columns(list(document.values())):
        raise DataError(
            f"data.source {name} holds columns: write its rows as a list of objects, as pandas' to_json(FILE, "
            'orient="records") does'
        )
    if len(rows) > 1 and len(rows) == len(document) and not is_record | has_known_form(tuple(document)):
        raise DataError(
            f"data.source {name} holds {len(rows)} lists of rows, {', '.join(map(repr, document))}: write the one to "
            "train on as a file of its own; what is held out is chosen from it"
        )
    found = rows[0] if len(rows) == 1 and not is_record else [document] if document else []
    yield from (SourceRow(line, row) for line, row in enumerate(found, start=1))


def _is_columns(values: list[Any]) -> bool:
    """Whether these are the columns of a table, each a list of cells or an object of them by row."""
    is_list = all(isinstance(each, list) and each and not isinstance(each[0], dict) for each in values)
    is_object = all(isinstance(each, dict) and next(iter(each), "") == "0" for each in values)
    return len(values) > 1 and (is_list or is_object) and len(set(map(len, values))) == 1


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
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _with_names(value: object) -> object:
    """The value, or `Unreadable` where the name of a column cannot be encoded."""
    try:
        if isinstance(value, dict):
            "".join(value).encode()
    except UnicodeEncodeError as exc:  # from an escape such as \ud800, which JSON lets pass
        return Unreadable(f"a column's name is not valid Unicode: lone surrogate {exc.object[exc.start]!r}")
    return value


def _read_parquet(path: Path, name: str, form: Form, wanted: Wanted) -> Iterator[Rows]:

    if not form.packed:
        yield from read_parquet(path, name, wanted)
        return
    with tempfile.NamedTemporaryFile(prefix="fineloop-source-", suffix=".parquet") as whole:
        with opened(path, form.packed) as file:
            shutil.copyfileobj(file, whole)
        whole.flush()
        yield from read_parquet(Path(whole.name), name, wanted)


# Reads the rows of tables: CSV row by row, Parquet batch by batch. An empty cell reads like a missing column.

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
