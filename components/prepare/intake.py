"""Read every source to the end: the records that pass, the rows that do not, and whether that is acceptable."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from components.prepare.dataset import Reject
from components.prepare.rows import SourceRow, Unreadable, read_rows
from components.prepare.sources import Source
from components.prepare.validate import EXPECTED, KeyedRecord, has_known_form, validate
from components.shared.errors import DataError

logger = logging.getLogger(__name__)

_MAX_ROW_CHARS = 2000
_MAX_NAMES_SHOWN = 20
_REASONS_SHOWN = 3


@dataclass(frozen=True)
class SourceCount:
    """What one source gave."""

    source: Source
    rows: int
    rejected: int


@dataclass
class Intake:
    """Everything that was read, in the order of the sources."""

    accepted: list[KeyedRecord] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have each column."""
    num_known_form: int = 0
    """Rows whose columns are those of a record, whatever they hold."""
    sources: list[SourceCount] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows read, good and bad."""
        return len(self.accepted) + len(self.rejects)

    @property
    def rejected_share(self) -> float:
        """Share of rows that are unusable."""
        return len(self.rejects) / self.num_rows if self.num_rows else 0.0

    def by_source(self) -> Iterator[tuple[Source, list[KeyedRecord]]]:
        """Each source with the records that it gave."""
        start = 0
        for each in self.sources:
            end = start + each.rows - each.rejected
            yield each.source, self.accepted[start:end]
            start = end

    def reasons(self) -> list[tuple[str, int, Reject]]:
        """Kinds of reason, most frequent first: the kind, its count, its first example."""
        counts: Counter[str] = Counter()
        examples: dict[str, Reject] = {}
        for reject in self.rejects:
            kind = _kind_of(reject.reason)
            counts[kind] += 1
            examples.setdefault(kind, reject)
        # A kind that occurs once is best shown as it was said.
        return [
            (examples[kind].reason if count == 1 else kind, count, examples[kind])
            for kind, count in counts.most_common()
        ]


def read(sources: Iterable[Source], *, group: str = "") -> Intake:
    """Validate every row of every source; `group` is data.group.

    Raises:
        DataError: a source cannot be opened.
        StoreError: an s3:// source cannot be read.
    """
    intake = Intake()
    shapes: Counter[tuple[str, ...]] = Counter()
    for source in sources:
        rows_before, rejected_before = intake.num_rows, len(intake.rejects)
        for row in read_rows(source, group=group):
            if isinstance(row.value, dict):
                shapes[tuple(row.value) + row.unread_columns] += 1
            try:
                if isinstance(row.value, Unreadable):
                    raise DataError(row.value.reason)
                intake.accepted.append(validate(row.value, group=group, source=source.entry))
            except DataError as exc:
                intake.rejects.append(Reject(source.name, row.line, str(exc), _row_text(row)))
        counted = SourceCount(source, intake.num_rows - rows_before, len(intake.rejects) - rejected_before)
        intake.sources.append(counted)
        logger.info("%s: %d rows, %d of them unusable", source.name, counted.rows, counted.rejected)
    for columns, count in shapes.items():
        for column in columns:
            intake.columns[column] += count
        if has_known_form(columns):
            intake.num_known_form += count
    return intake


def require_usable(intake: Intake, *, max_reject_share: float) -> None:
    """Stop on data that should not be trained on.

    Raises:
        DataError: no rows, none with the columns of a record, none usable, or too many unusable.
    """
    names = _listed([each.source.name for each in intake.sources])
    if not intake.num_rows:
        raise DataError(f"data.source has no rows: {names} {'is' if len(intake.sources) == 1 else 'are'} empty")
    if intake.columns and not intake.num_known_form:
        raise DataError(
            f"data.source has no row with the expected columns ({names}): "
            f"found {_listed([repr(column) for column, _ in intake.columns.most_common()])}; expected {EXPECTED}"
        )
    share = intake.rejected_share
    if not intake.accepted:
        raise DataError(f"data.source has no usable row among {intake.num_rows}:{_reasons_text(intake)}")
    if share > max_reject_share:
        raise DataError(
            f"{share:.1%} of rows are unusable ({len(intake.rejects)} of {intake.num_rows}), more than "
            f"data.max_reject_share = {max_reject_share:g} allows:{_reasons_text(intake)}\n"
            "Fix these rows or raise data.max_reject_share."
        )
    logger.info(
        "%d of %d rows are unusable (%.2f %%; data.max_reject_share is %g)",
        len(intake.rejects),
        intake.num_rows,
        100 * share,
        max_reject_share,
    )


def _reasons_text(intake: Intake) -> str:
    reasons = intake.reasons()
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
