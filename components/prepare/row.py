"""One row as it was read, before anything is asked of it."""

from collections.abc import Callable, Collection
from typing import NamedTuple


class Unreadable(NamedTuple):
    """Stands in for a row that could not even be parsed."""

    reason: str


class SourceRow(NamedTuple):
    """One row with where it came from."""

    line: int
    """1-based: the line of a JSONL or CSV file (blank ones count), the row of anything else."""
    value: object
    """What was parsed, or `Unreadable`."""
    raw: bytes | None = None
    """The line itself, where there is one."""
    unread_columns: tuple[str, ...] = ()
    """Columns that the row has and `value` leaves out, because no record needs them."""


Wanted = Callable[[Collection[str]], Collection[str]]
"""Of a file's columns, those to read."""
