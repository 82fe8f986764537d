"""Validates the rows of one source, a batch at a time: into records and rejected rows, with counts of both."""

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from components.config.train import ColumnsConfig, DataConfig, LossOn
from components.prepare.arrow_records import keyed_batch_of
from components.prepare.dataset import Reject
from components.prepare.personal import Action, Kind, Screen
from components.prepare.plain import Plain, plain
from components.prepare.row import Rows, SourceRow, Unreadable
from components.prepare.rows import read_rows
from components.prepare.shapes import Row, Shape, as_record, columns_read, id_of, is_record, recognised
from components.prepare.sources import Source, local_copies
from components.prepare.validate import KeyedRecord, ids_of, unread_keys, validate
from components.registry.between_runs import NONE_ERASED, Erased
from components.shared.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_ROW_CHARS, _MAX_SHOWN_CHARS = 2000, 300
_OF_NOBODY_KNOWN = "[withheld: records were erased, and this row has no id that says it is none of them]"


class Validated(NamedTuple):
    """The result of validating some rows."""

    batch: "pa.RecordBatch"
    """The records that may be used, in order, with the columns of `keyed_batch`."""
    rejects: list[Reject]
    withheld: int
    """Number of records that hold personal data, where data.personal leaves them out."""
    erased: int
    """Number of rows of erased records, usable or not."""
    columns: Counter[tuple[str, ...]]
    """Number of rows by the names of all their columns."""
    unread: Counter[str]
    """Number of rows by the keys of their messages that nothing is read from, as `unread_keys` names them."""
    personal: Counter[Kind]
    """Number of pieces of personal data in the records, by kind."""
    with_personal: int
    """Number of records that hold any personal data."""
    shown: list[tuple[str, str]]
    """Shapes that this validation first met in these rows: name, and in words a row and the record that it becomes."""


Judged = KeyedRecord | Reject | Literal["withheld", "erased"]


class Validation:
    """Turns rows into records."""

    def __init__(self, *, group: str, columns: ColumnsConfig, screen: Screen, erased: Erased, loss_on: LossOn) -> None:
        """`group`, `columns` and `loss_on` are keys of data; `screen` sees each message; `erased` rows are counted."""
        self._group, self._columns, self._screen, self._erased = group, columns, screen, erased
        self._validated = partial(validate, group=group, loss_on=loss_on, screen=screen.message)
        self._unread = Counter[str]()
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._shown: dict[str, str] = {}
        self._as_they_are: set[tuple[str, ...]] = set()

    def shape_of(self, names: tuple[str, ...]) -> Shape | None:
        """The shape of rows with these columns and no other."""
        if names not in self._shapes:
            self._shapes[names] = recognised(names, self._columns)
        return self._shapes[names]

    def of(self, source: Source, rows: Rows) -> Validated:
        """Validate these rows, which all come from this source."""
        columns: Counter[tuple[str, ...]] = Counter()
        known, self._unread = len(self._shown), Counter()
        judged: dict[int, Judged] = {}
        simple: dict[int, Row] = {}
        for place, value in enumerate(rows.values):
            if isinstance(value, dict):
                names = tuple(value) + rows.unread_columns
                columns[names] += 1
                if (record := self._simple(names, value)) is not None:
                    simple[place] = record
                    continue
            judged[place] = self._judged(source, rows.row(place))
        taken = self._plain(source, simple)
        for place in taken.places if taken else ():
            self._unread.update(unread_keys(simple[place]))
        for place in simple.keys() - (taken.places if taken else ()):
            judged[place] = self._judged(source, rows.row(place))
        in_order = [(place, judged[place]) for place in sorted(judged)]
        return Validated(
            _merged(taken, {place: each for place, each in in_order if isinstance(each, KeyedRecord)}),
            [each for _, each in in_order if isinstance(each, Reject)],
            sum(each == "withheld" for each in judged.values()),
            sum(each == "erased" for each in judged.values()),
            columns,
            self._unread,
            *self._screen.taken(),
            [*self._shown.items()][known:],
        )

    def _plain(self, source: Source, rows: Mapping[int, Row]) -> Plain | None:
        """The plain rows among these, without erased records; None where none is left."""
        taken = plain(rows, self._group, source.entry, self._screen.changes)
        if taken is None or not self._erased:
            return taken
        has, batch = self._erased.has, taken.batch
        ids = zip(batch["id"].to_pylist(), batch["named"].to_pylist(), batch["content"].to_pylist(), strict=True)
        is_erased = [has(name) or (not named and has(content.hex())) for name, named, content in ids]
        kept = {place: rows[place] for place, gone in zip(taken.places, is_erased, strict=True) if not gone}
        return plain(kept, self._group, source.entry, self._screen.changes) if any(is_erased) else taken

    def _simple(self, names: tuple[str, ...], row: Row) -> Row | None:
        """The row with a record's columns, which may be plain; None where it has to be validated by itself."""
        if names in self._as_they_are:
            return row
        shape = self.shape_of(names)
        if shape is None or shape.name not in self._shown:
            return None
        if is_record(shape, self._columns):
            self._as_they_are.add(names)
        try:
            return as_record(row, shape, self._columns, group=self._group)
        except DataError:
            return None

    def _judged(self, source: Source, row: SourceRow) -> Judged:
        """Validate one row by itself."""
        screen, erased = self._screen, self._erased
        row_id = id_of(row.value, self._columns) if erased else None
        if row_id is not None and erased.has(row_id):
            return "erased"
        screen.begin()
        value, shape = row.value, None
        try:
            if isinstance(value, Unreadable):
                raise DataError(value.reason)
            if isinstance(value, dict):
                shape = self.shape_of(tuple(value) + row.unread_columns)
                value = as_record(value, shape, self._columns, group=self._group)
                self._unread.update(unread_keys(value))
            record = self._validated(value, source=source.entry)
        except DataError as exc:
            kept = screen.kept(_text_of(row)) if row_id is not None or not erased else _OF_NOBODY_KNOWN
            return Reject(source.name, row.line, str(exc), kept)
        if erased and any(map(erased.has, ids_of(record))):
            return "erased"
        if not screen.end():
            return "withheld"
        if shape and shape.name not in self._shown:
            self._shown[shape.name] = _described(source, row, screen.kept(_text_of(row)), shape, record)
        return record


def _merged(taken: Plain | None, judged: Mapping[int, KeyedRecord]) -> "pa.RecordBatch":
    """Both as one batch, in the order of their places."""
    import numpy as np
    import pyarrow as pa

    alone = keyed_batch_of(list(judged.values()))
    if taken is None:
        return alone
    if not judged:
        return taken.batch
    order = np.argsort([*taken.places, *judged])
    return pa.concat_batches([taken.batch, alone]).take(pa.array(order))


def _described(source: Source, row: SourceRow, row_text: str, shape: Shape, keyed: KeyedRecord) -> str:
    record = keyed.record
    asked = record.asked if isinstance(record.asked, str) else json.dumps(record.asked, ensure_ascii=False)
    return (
        f"{source.name}:{row.line} is read as {shape.name}: {row_text[:_MAX_SHOWN_CHARS]} becomes the prompt "
        f"{asked[:_MAX_SHOWN_CHARS]!r} and the answer {record.answer_text[:_MAX_SHOWN_CHARS]!r}"
    )


def _text_of(row: SourceRow) -> str:
    if row.raw is not None:
        # 4 bytes make one character at most: no need to decode more of a very long line.
        return row.raw[: 4 * _MAX_ROW_CHARS].decode(errors="replace").rstrip("\r\n")[:_MAX_ROW_CHARS]
    if isinstance(row.value, Unreadable):
        return ""
    try:
        return json.dumps(row.value, ensure_ascii=False, default=str)[:_MAX_ROW_CHARS]
    except RecursionError:  # nested almost too deeply to have been read
        return ""


# Reads and validates the rows of sources, in order: in this process, or wherever an engine runs it.


@dataclass(frozen=True)
class Rules:
    """The rules by which a row becomes a record. Each but `erased` is the key of `data` with the same name."""

    group: str = ""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    personal: Action = "report"
    phone_regions: tuple[str, ...] = ()
    personal_names: bool = False
    loss_on: LossOn = "last"
    erased: Erased = NONE_ERASED

    @classmethod
    def of(cls, data: DataConfig, erased: Erased = NONE_ERASED) -> "Rules":
        """The rules of a config, with the records that were erased."""
        regions = tuple(data.phone_regions)
        return cls(data.group, data.columns, data.personal, regions, data.personal_names, data.loss_on, erased)

    def validation(self) -> Validation:
        """The validation that applies these rules to rows.

        Raises:
            DataError: names are looked for, and presidio-analyzer is not installed.
        """
        screen = Screen(self.personal, regions=self.phone_regions, names=self.personal_names)
        erased, on = self.erased, self.loss_on
        return Validation(group=self.group, columns=self.columns, screen=screen, erased=erased, loss_on=on)


class Batch(NamedTuple):
    """Some rows of one source, in order."""

    place: int
    """The index of the source among all sources."""
    rows: int
    """How many rows were read."""
    validated: Validated


Reader = Callable[[Sequence[Source], Rules], Iterator[Batch]]
"""A function that validates every row of every source, and yields the results in order; it raises DataError where a
source cannot be opened, and StoreError where one in S3 cannot be read."""


def read_here(sources: Sequence[Source], rules: Rules) -> Iterator[Batch]:
    """The reader that runs in this process alone."""
    validation = rules.validation()
    with nothing_old_collected():
        for place, rows in rows_of(sources, rules):
            yield Batch(place, len(rows.lines), validation.of(sources[place], rows))


def rows_of(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Rows]]:
    """Yield all rows in batches, each with the index of its source."""
    wanted = partial(columns_read, named=rules.columns, group=rules.group)
    for place, (source, path) in enumerate(local_copies(sources)):
        for rows in read_rows(source, path, wanted=wanted):
            yield place, rows


@contextlib.contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Exclude all existing objects from garbage collection. Libraries have a million of them, and Python would go
    through all after every few batches: a third of the reading time, although rows have no reference cycles."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
