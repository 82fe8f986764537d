"""From sources to validated rows, in order: in this process, or wherever an engine has it done."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from components.config.columns import ColumnsConfig
from components.config.data import DataConfig
from components.prepare.local_copies import local_copies
from components.prepare.row import Rows
from components.prepare.rows import read_rows
from components.prepare.screen import Action, Screen
from components.prepare.shapes import columns_read
from components.prepare.sources import Source
from components.prepare.validation import Validated, Validation
from components.registry.erasures import NONE_ERASED, Erased


@dataclass(frozen=True)
class Rules:
    """What makes a row a record; each is the key of `data` of its name, but for the records that were erased."""

    group: str = ""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    personal: Action = "report"
    phone_regions: tuple[str, ...] = ()
    personal_names: bool = False
    erased: Erased = NONE_ERASED

    @classmethod
    def of(cls, data: DataConfig, erased: Erased = NONE_ERASED) -> "Rules":
        """Those of a config."""
        regions = tuple(data.phone_regions)
        return cls(data.group, data.columns, data.personal, regions, data.personal_names, erased)

    def validation(self) -> Validation:
        """What applies them to rows.

        Raises:
            DataError: names are looked for, and presidio-analyzer is not installed.
        """
        screen = Screen(self.personal, regions=self.phone_regions, names=self.personal_names)
        return Validation(group=self.group, columns=self.columns, screen=screen, erased=self.erased)


class Batch(NamedTuple):
    """Some rows of one source, in order."""

    place: int
    """Of the source among all."""
    rows: int
    """How many were read."""
    validated: Validated


Reader = Callable[[Sequence[Source], Rules], Iterator[Batch]]
"""Validates every row of every source, and gives what became of them in order; raises DataError where a source cannot
be opened, and StoreError where one in S3 cannot be read."""


def read_here(sources: Sequence[Source], rules: Rules) -> Iterator[Batch]:
    """The reader that is this process alone."""
    validation = rules.validation()
    with nothing_old_collected():
        for place, rows in rows_of(sources, rules):
            yield Batch(place, len(rows.lines), validation.of(sources[place], rows))


def rows_of(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Rows]]:
    """All rows, some at a time, each with its source's place."""
    wanted = partial(columns_read, named=rules.columns, group=rules.group)
    for place, (source, path) in enumerate(local_copies(sources)):
        for rows in read_rows(source, path, wanted=wanted):
            yield place, rows


@contextlib.contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Python goes through all objects that there are after every few batches of rows, and libraries have a million: it
    would be a third of the time that reading takes, for no rows have cycles."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
