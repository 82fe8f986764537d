"""Rows as they were read, before any validation."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

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
