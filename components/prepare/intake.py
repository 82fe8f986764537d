"""Read every source to the end: the records that pass, the rows that do not, and whether that is acceptable."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components.config.train import ColumnsConfig
from components.prepare.dataset import Reject
from components.prepare.formats import form_of
from components.prepare.personal import Kind
from components.prepare.rows import SAVE_AS_UTF_8
from components.prepare.shapes import EXPECTED, advice, columns_read, recognised
from components.prepare.sources import Source
from components.prepare.validation import Reader, Rules, Validated, read_here
from components.shared.durations import counted
from components.shared.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_NOT_UTF_8 = "not UTF-8 at byte"
_MAX_NAMES_SHOWN = 20
_REASONS_SHOWN = 3
NO_RULES = Rules()


@dataclass(frozen=True)
class SourceCount:
    """What one source gave."""

    source: Source
    rows: int = 0
    rejected: int = 0
    withheld: int = 0
    """Records that hold personal data, where data.personal leaves them out."""
    erased: int = 0
    """Rows of records that were erased."""

    @property
    def accepted(self) -> int:
        """Records that may be used."""
        return self.rows - self.rejected - self.withheld - self.erased

    def with_batch(self, rows: int, validated: Validated) -> "SourceCount":
        """Return the counts with another batch of `rows` rows added."""
        return SourceCount(
            self.source,
            self.rows + rows,
            self.rejected + len(validated.rejects),
            self.withheld + validated.withheld,
            self.erased + validated.erased,
        )


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

    reasons: Reasons = field(default_factory=Reasons)
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have each column."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows in a shape that we know, of which nothing is read from this column, or from this key of a message."""
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
        return sum(each.rows for each in self.sources)

    @property
    def accepted(self) -> int:
        """Records that may be used."""
        return sum(each.accepted for each in self.sources)

    @property
    def rejected(self) -> int:
        """Rows that are unusable."""
        return sum(each.rejected for each in self.sources)

    @property
    def withheld(self) -> int:
        """Records that hold personal data, where data.personal leaves them out."""
        return sum(each.withheld for each in self.sources)

    @property
    def erased(self) -> int:
        """Rows of records that were erased, usable or not."""
        return sum(each.erased for each in self.sources)

    @property
    def rejected_share(self) -> float:
        """Share of rows that are unusable."""
        return self.rejected / self.num_rows if self.num_rows else 0.0

    def by_source(self) -> Iterator[tuple[Source, range]]:
        """Each source with which of the accepted records it gave."""
        start = 0
        for each in self.sources:
            end = start + each.accepted
            yield each.source, range(start, end)
            start = end


def read(
    sources: Sequence[Source],
    accept: Callable[["pa.RecordBatch"], None],
    reject: Callable[[Reject], None],
    *,
    rules: Rules = NO_RULES,
    reader: Reader = read_here,
) -> Intake:
    """Validate every row of every source. What was erased is only counted.

    Records are handed over a batch at a time, as `keyed_batch` has them, and rejects as they come. What shape the rows
    are in is said at the first row that can be used, with the row and the record that it becomes.

    Raises:
        DataError: a source cannot be opened.
        StoreError: an s3:// source cannot be read.
    """
    intake = Intake(sources=[SourceCount(source) for source in sources])
    found: Counter[tuple[str, ...]] = Counter()
    shown: set[str] = set()
    ended = 0
    for place, rows, validated in reader(sources, rules):
        _say_read(intake.sources[ended:place])
        ended = place
        for name, words in validated.shown:
            if name not in shown:
                logger.info("%s", words)
            shown.add(name)
        found.update(validated.columns)
        intake.unread.update(validated.unread)
        intake.personal.update(validated.personal)
        intake.with_personal += validated.with_personal
        accept(validated.batch)
        for each in validated.rejects:
            intake.reasons.add(each)
            reject(each)
        intake.sources[place] = intake.sources[place].with_batch(rows, validated)
    _say_read(intake.sources[ended:])
    for names, count in found.items():
        for column in names:
            intake.columns[column] += count
        if shape := recognised(names, rules.columns):
            intake.num_known_form += count
            intake.shapes[shape.name] += count
            used = columns_read(names, rules.columns, group=rules.group)
            intake.unread.update({column: count for column in names if column not in used})
    return intake


def _say_read(sources: Sequence[SourceCount]) -> None:
    for each in sources:
        logger.info("%s: %s, %s unusable", each.source.name, counted(each.rows, "row"), f"{each.rejected:,}")


def require_usable(intake: Intake, *, max_reject_share: float, columns: ColumnsConfig | None = None) -> None:
    """Stop on data that should not be trained on; `columns` is data.columns, as for `read`.

    Raises:
        DataError: no rows, none with the columns of a record, none usable, or too many unusable.
    """
    names = _listed([each.source.name for each in intake.sources])
    if not intake.num_rows:
        raise DataError(f"data.source has no rows: {names} {'is' if len(intake.sources) == 1 else 'are'} empty")
    if intake.columns and not intake.num_known_form:
        is_csv = all((form := form_of(each.source.name)) and form.kind == "csv" for each in intake.sources)
        header = ". Where the first row holds data, write one with the columns' names above it" if is_csv else ""
        raise DataError(
            f"data.source has no row with the expected columns ({names}): "
            f"found {_listed([repr(column) for column, _ in intake.columns.most_common()])}; expected {EXPECTED}. "
            f"{advice(list(intake.columns), columns or ColumnsConfig())}{header}"
        )
    share = intake.rejected_share
    if not intake.accepted:
        raise DataError(f"data.source has no usable row among {intake.num_rows:,}:{_reasons_text(intake)}")
    if share > max_reject_share:
        raise DataError(
            f"{share:.1%} of rows are unusable ({intake.rejected:,} of {intake.num_rows:,}), more than "
            f"data.max_reject_share = {max_reject_share:g} allows:{_reasons_text(intake)}\n"
            "Fix these rows or raise data.max_reject_share."
        )
    if intake.rejected:
        logger.info("%.2f %% of rows are unusable; data.max_reject_share = %g allows it", 100 * share, max_reject_share)


def _reasons_text(intake: Intake) -> str:
    reasons = intake.reasons.most_common()
    lines = [
        f"\n  {count:,} x {reason} (for example {example.source}:{example.line})"
        for reason, count, example in reasons[:_REASONS_SHOWN]
    ]
    if hidden := reasons[_REASONS_SHOWN:]:
        lines.append(f"\n  {sum(count for _, count, _ in hidden)} x {len(hidden)} other reasons")
    if any(reason.startswith(_NOT_UTF_8) for reason, _, _ in reasons):
        lines.append(f"\n{SAVE_AS_UTF_8}.")
    return "".join(lines)


def _kind_of(reason: str) -> str:
    """The reason without its positions, so that like reasons count together."""
    reason = re.sub(r"\[\d+\]", "[N]", reason)
    return re.sub(r"\b(byte|column) \d+", r"\1 N", reason)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    hidden = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
