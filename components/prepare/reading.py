"""Reads and validates the rows of sources, in order: in this process, or wherever an engine runs it."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from components.config.columns import ColumnsConfig
from components.config.data import DataConfig, LossOn
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
