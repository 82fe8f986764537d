"""Datasets of records at hand, and rows on their way to one, for tests."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from components.config.train import DataConfig
from components.prepare import dataset, prepare, workspace
from components.prepare import split as splitting
from components.prepare.dataset import DatasetFolder, Hashes, Record, Reject, batch_of, keyed_batch, record_of
from components.prepare.prepare import Intake
from components.prepare.sources import Source
from components.prepare.validate import Rules, keyed
from components.prepare.validate import validate as record_of_row
from components.registry.between_runs import NONE_ERASED, Erased
from components.store.store import Store

SMALL = 2**29
"""Memory in bytes."""


def publish(
    store: Store, *, train: Sequence[Record], evaluation: Sequence[Record], replay: Sequence[Record] | None = None
) -> DatasetFolder:
    """As the prepare step publishes it."""
    with tempfile.TemporaryDirectory() as folder:
        rejects = Path(folder, "rejects.parquet")
        rejects.touch()
        answered = None if replay is None else [batch_of(replay)]
        written = dataset.write_splits(Path(folder), [batch_of(train)], [batch_of(evaluation)], answered)
        return dataset.publish_dataset(store, written, rejects=rejects, rejected=0, profile={})


def dataset_id(train: Sequence[Record], evaluation: Sequence[Record]) -> str:
    """The id that the prepare step gives them."""
    with tempfile.TemporaryDirectory() as folder:
        return dataset.write_splits(Path(folder), [batch_of(train)], [batch_of(evaluation)]).dataset_id


@dataclass(frozen=True, slots=True)
class KeyedRecord:
    """A record with the hashes that decide its split and its duplicates, and whether its row gave an id."""

    record: Record
    key: bytes
    place: bytes
    content: bytes
    turns: bytes
    named: bool


def keyed_records(batch: pa.RecordBatch) -> Iterator[KeyedRecord]:
    """The records of a batch of `keyed`."""
    hashes = batch.select([*Hashes._fields, "named"]).to_pylist()
    return (KeyedRecord(record, **each) for record, each in zip(map(record_of, batch.to_pylist()), hashes, strict=True))


def validate(row: object, **rules: Any) -> KeyedRecord:
    """The record that a row becomes by itself."""
    (found,) = keyed_records(keyed([record_of_row(row, **rules)]))
    return found


@dataclass
class Read:
    """What `intake.read` handed over, and its counts."""

    counts: Intake = field(default_factory=Intake)
    accepted: list[KeyedRecord] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def read(sources: Sequence[Source], *, erased: Erased = NONE_ERASED, **data: Any) -> Read:
    """All rows of the sources, kept."""
    found, rules = Read(), Rules(DataConfig(source=[], **data), erased=erased)

    def accept(batch: pa.RecordBatch) -> None:
        found.accepted.extend(keyed_records(batch))

    found.counts = prepare.read_sources(sources, accept, found.rejects.append, rules=rules)
    return found


@contextmanager
def holding(rows: Iterable[KeyedRecord], *, memory_bytes: int = SMALL) -> Iterator[workspace.Workspace]:
    """A workspace that has read these rows."""
    with workspace.opened(memory_bytes=memory_bytes) as work:
        pending = iter(rows)
        while batch := list(islice(pending, 1000)):
            hashes = Hashes(*([getattr(each, name) for each in batch] for name in Hashes._fields))
            work.accept(keyed_batch(batch_of([each.record for each in batch]), hashes, [each.named for each in batch]))
        work.finish()
        yield work


def deduplicate(rows: Sequence[KeyedRecord], *, memory_bytes: int = SMALL) -> SimpleNamespace:
    """The rows that stay, and the counts of those that do not."""
    with holding(rows, memory_bytes=memory_bytes) as work:
        dropped = splitting.deduplicate(work)
        kept = [rows[number] for (number,) in work.rows("SELECT number FROM chosen ORDER BY number")]
    return SimpleNamespace(records=kept, **dropped)


def split(
    rows: Sequence[KeyedRecord],
    *,
    memory_bytes: int = SMALL,
    window: list[splitting.Span] | None = None,
    **options: Any,
) -> SimpleNamespace:
    """Both sides of the split of distinct rows as lists, the dataset's id, and the counts; `options` are of data."""
    defaults = {"source": [], "near_duplicates": 0.0, "max_reject_share": 1.0, "window_days": 1.0 if window else 0.0}
    with holding(rows, memory_bytes=memory_bytes) as work:
        splitting.deduplicate(work)
        found = splitting.split(work, DataConfig(**defaults | options), window=window)
        sides = {"train": list(found.parts.train), "evaluation": list(found.parts.evaluation)}
        about = {"parts": None, "dataset_id": found.parts.dataset_id}
        return SimpleNamespace(**vars(found) | found.dropped | sides | about)
