"""Read every source to the end: the records that pass, the rows that do not, and whether that is acceptable."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from components.config.columns import ColumnsConfig
from components.prepare.dataset import Reject
from components.prepare.local_copies import local_copies
from components.prepare.personal import Kind
from components.prepare.row import SourceRow, Unreadable
from components.prepare.rows import read_rows
from components.prepare.screen import Screen
from components.prepare.shapes import EXPECTED, Shape, advice, as_record, columns_read, id_of, recognised
from components.prepare.sources import Source
from components.prepare.validate import KeyedRecord, ids_of, validate
from components.registry.erasures import NONE_ERASED, Erased
from components.shared.errors import DataError

logger = logging.getLogger(__name__)

_MAX_ROW_CHARS = 2000
_MAX_SHOWN_CHARS = 300
_MAX_NAMES_SHOWN = 20
_REASONS_SHOWN = 3
_OF_NOBODY_KNOWN = "[withheld: records were erased, and this row has no id that says it is none of them]"


@dataclass(frozen=True)
class SourceCount:
    """What one source gave."""

    source: Source
    rows: int
    rejected: int
    withheld: int = 0
    """Records that hold personal data, where data.personal leaves them out."""
    erased: int = 0
    """Rows of records that were erased."""


class Reasons:
    """Why rows are unusable: each kind of reason with its count and its first example."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, Reject] = {}

    def add(self, reject: Reject) -> None:
        """Count one more."""
        kind = _kind_of(reject.reason)
        self._counts[kind] += 1
        self._examples.setdefault(kind, reject)

    def most_common(self) -> list[tuple[str, int, Reject]]:
        """Most frequent first: the kind, its count, its first example; a kind that occurs once as it was said."""
        return [
            (self._examples[kind].reason if count == 1 else kind, count, self._examples[kind])
            for kind, count in self._counts.most_common()
        ]


@dataclass
class Intake:
    """What was read, counted, in the order of the sources."""

    accepted: int = 0
    """Records that may be used."""
    rejected: int = 0
    """Rows that are unusable."""
    reasons: Reasons = field(default_factory=Reasons)
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have each column."""
    withheld: int = 0
    """Records that hold personal data, where data.personal leaves them out."""
    erased: int = 0
    """Rows of records that were erased, usable or not."""
    personal: Counter[Kind] = field(default_factory=Counter)
    """Pieces of personal data in the records that are usable, by kind."""
    with_personal: int = 0
    """Usable records that hold any."""
    num_known_form: int = 0
    """Rows whose columns are those of a record, whatever they hold."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Rows in each shape that we know."""
    sources: list[SourceCount] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows read, good and bad."""
        return self.accepted + self.rejected + self.withheld + self.erased

    @property
    def rejected_share(self) -> float:
        """Share of rows that are unusable."""
        return self.rejected / self.num_rows if self.num_rows else 0.0

    def by_source(self) -> Iterator[tuple[Source, range]]:
        """Each source with which of the accepted records it gave."""
        start = 0
        for each in self.sources:
            end = start + each.rows - each.rejected - each.withheld - each.erased
            yield each.source, range(start, end)
            start = end


def read(
    sources: Sequence[Source],
    accept: Callable[[KeyedRecord], None],
    reject: Callable[[Reject], None],
    *,
    group: str = "",
    columns: ColumnsConfig | None = None,
    screen: Screen | None = None,
    erased: Erased = NONE_ERASED,
) -> Intake:
    """Validate every row of every source; `group` is data.group, `columns` data.columns; `screen` sees each message.
    What was `erased` is only counted.

    Each record and each reject is handed over as it comes, and not kept. What shape the rows are in is said at the
    first row that can be used, with the row and the record that it becomes.

    Raises:
        DataError: a source cannot be opened.
        StoreError: an s3:// source cannot be read.
    """
    intake, named, screen = Intake(), columns or ColumnsConfig(), screen or Screen()
    found: Counter[tuple[str, ...]] = Counter()
    shapes: dict[tuple[str, ...], Shape | None] = {}
    shown: set[str] = set()
    for source, path in local_copies(sources):
        rows_before, rejected_before = intake.num_rows, intake.rejected
        withheld_before, erased_before = intake.withheld, intake.erased
        for row in read_rows(source, path, wanted=lambda names: columns_read(names, named, group=group)):
            shape = None
            if isinstance(row.value, dict):
                names = tuple(row.value) + row.unread_columns
                found[names] += 1
                if names not in shapes:
                    shapes[names] = recognised(names, named)
                shape = shapes[names]
            row_id = id_of(row.value, named) if erased else None
            if row_id is not None and erased.has(row_id):
                intake.erased += 1
                continue
            screen.begin()
            try:
                if isinstance(row.value, Unreadable):
                    raise DataError(row.value.reason)
                value = as_record(row.value, shape, named, group=group) if isinstance(row.value, dict) else row.value
                record = validate(value, group=group, source=source.entry, screen=screen.message)
            except DataError as exc:
                kept = screen.kept(_row_text(row)) if row_id is not None or not erased else _OF_NOBODY_KNOWN
                bad = Reject(source.name, row.line, str(exc), kept)
                intake.rejected += 1
                intake.reasons.add(bad)
                reject(bad)
                continue
            if erased and any(map(erased.has, ids_of(record))):
                intake.erased += 1
                continue
            if not screen.end():
                intake.withheld += 1
                continue
            intake.accepted += 1
            accept(record)
            if shape and shape.name not in shown:
                shown.add(shape.name)
                _show(source, row, screen.kept(_row_text(row)), shape, record)
        counted = SourceCount(
            source,
            intake.num_rows - rows_before,
            intake.rejected - rejected_before,
            intake.withheld - withheld_before,
            intake.erased - erased_before,
        )
        intake.sources.append(counted)
        logger.info("%s: %d rows, %d of them unusable", source.name, counted.rows, counted.rejected)
    intake.personal, intake.with_personal = screen.found, screen.records
    for names, count in found.items():
        for column in names:
            intake.columns[column] += count
        if shape := shapes[names]:
            intake.num_known_form += count
            intake.shapes[shape.name] += count
    return intake


def _show(source: Source, row: SourceRow, row_text: str, shape: Shape, record: KeyedRecord) -> None:
    asked = (
        record.record.asked
        if isinstance(record.record.asked, str)
        else json.dumps(record.record.asked, ensure_ascii=False)
    )
    logger.info(
        "%s:%d is read as %s: %s becomes the prompt %r and the answer %r",
        source.name,
        row.line,
        shape.name,
        row_text[:_MAX_SHOWN_CHARS],
        asked[:_MAX_SHOWN_CHARS],
        record.record.answer_text[:_MAX_SHOWN_CHARS],
    )


def require_usable(intake: Intake, *, max_reject_share: float, columns: ColumnsConfig | None = None) -> None:
    """Stop on data that should not be trained on; `columns` is data.columns, as for `read`.

    Raises:
        DataError: no rows, none with the columns of a record, none usable, or too many unusable.
    """
    names = _listed([each.source.name for each in intake.sources])
    if not intake.num_rows:
        raise DataError(f"data.source has no rows: {names} {'is' if len(intake.sources) == 1 else 'are'} empty")
    if intake.columns and not intake.num_known_form:
        raise DataError(
            f"data.source has no row with the expected columns ({names}): "
            f"found {_listed([repr(column) for column, _ in intake.columns.most_common()])}; expected {EXPECTED}. "
            f"{advice(list(intake.columns), columns or ColumnsConfig())}"
        )
    share = intake.rejected_share
    if not intake.accepted:
        raise DataError(f"data.source has no usable row among {intake.num_rows}:{_reasons_text(intake)}")
    if share > max_reject_share:
        raise DataError(
            f"{share:.1%} of rows are unusable ({intake.rejected} of {intake.num_rows}), more than "
            f"data.max_reject_share = {max_reject_share:g} allows:{_reasons_text(intake)}\n"
            "Fix these rows or raise data.max_reject_share."
        )
    logger.info(
        "%d of %d rows are unusable (%.2f %%; data.max_reject_share is %g)",
        intake.rejected,
        intake.num_rows,
        100 * share,
        max_reject_share,
    )


def _reasons_text(intake: Intake) -> str:
    reasons = intake.reasons.most_common()
    lines = [
        f"\n  {count} x {reason} (for example {example.source}:{example.line})"
        for reason, count, example in reasons[:_REASONS_SHOWN]
    ]
    if hidden := reasons[_REASONS_SHOWN:]:
        lines.append(f"\n  {sum(count for _, count, _ in hidden)} x {len(hidden)} other reasons")
    return "".join(lines)


def _kind_of(reason: str) -> str:
    """The reason without its positions, so that like reasons count together."""
    reason = re.sub(r"\[\d+\]", "[N]", reason)
    return re.sub(r"\b(byte|column) \d+", r"\1 N", reason)


def _row_text(row: SourceRow) -> str:
    if row.raw is not None:
        # 4 bytes make one character at most: no need to decode more of a very long line.
        return row.raw[: 4 * _MAX_ROW_CHARS].decode(errors="replace").rstrip("\r\n")[:_MAX_ROW_CHARS]
    if isinstance(row.value, Unreadable):
        return ""
    return json.dumps(row.value, ensure_ascii=False, default=str)[:_MAX_ROW_CHARS]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    hidden = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
