"""Writes a dataset's files as its records come, computes its id from them, and publishes its folder to the store."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.prepare.arrow_records import NOT_ALWAYS, identities, records_of, sizes, with_columns
from components.prepare.dataset import FORMAT, REJECTS, Record, SplitName
from components.registry.identity import TOKENS
from components.shared.errors import Conflict
from components.store import folders

if TYPE_CHECKING:
    import pyarrow as pa

    from components.store.store import Store

logger = logging.getLogger(__name__)

MOST_RECORDS, MOST_BYTES = 2**17, 2**28
"""Bounds on one part: its records, and bytes of prompts and answers. It ends with the record that reaches either."""
_GROUP_BYTES = 2**25
"""Approximate bytes of a row group, which a writer buffers."""
_READ_RECORDS = 1024


@dataclass(frozen=True)
class Part:
    """A split as local files, in order."""

    paths: tuple[Path, ...]
    name: SplitName
    records: int

    def __len__(self) -> int:
        """The number of records."""
        return self.records

    def __iter__(self) -> Iterator[Record]:
        """Iterate over the records, reading them in batches."""
        import pyarrow.parquet as pq

        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_READ_RECORDS, use_threads=False):
                    yield from records_of(batch)

    def head(self, count: int) -> list[Record]:
        """The first `count` records, or all where there are fewer."""
        return list(islice(self, count))

    @property
    def files(self) -> dict[str, Path]:
        """The local files, by their paths within the dataset's folder."""
        return {f"{self.name}/{path.name}": path for path in self.paths}


@dataclass(frozen=True)
class Parts:
    """A dataset's records as local files."""

    dataset_id: str
    """`d` and 15 hex digits of a hash over all splits' records in order, however they are divided into files."""
    train: Part
    evaluation: Part
    replay: Part | None = None
    """Earlier records that production is to answer; None where the dataset has no such split."""

    @property
    def splits(self) -> list[Part]:
        """All splits that the dataset has."""
        return [self.train, self.evaluation, *([self.replay] if self.replay else [])]


def write(
    folder: Path,
    train: Iterable["pa.RecordBatch"],
    evaluation: Iterable["pa.RecordBatch"],
    replay: Iterable["pa.RecordBatch"] | None = None,
    *,
    columns: Set[str] = NOT_ALWAYS,
) -> Parts:
    """Write the splits below the folder; `columns` are the optional columns (NOT_ALWAYS) to write.

    Where a part ends depends on the records alone. Each split has one part at least.
    """
    digest = hashlib.sha256(f"fineloop dataset {FORMAT}\n".encode())
    splits = []
    given: dict[SplitName, Iterable[pa.RecordBatch] | None] = {"train": train, "eval": evaluation, "replay": replay}
    for name, batches in given.items():
        if batches is None:
            continue
        digest.update(f"{name}\n".encode())
        writer = _Writer(Path(folder, name), columns)
        with writer:
            for batch in batches:
                digest.update(identities(batch))
                writer.write(batch)
        splits.append(Part(tuple(writer.paths), name, writer.records))
    return Parts(f"d{digest.hexdigest()[:15]}", *splits)


@dataclass(frozen=True)
class DatasetFolder:
    """A dataset's folder in the store."""

    dataset_id: str
    uri: str
    created: bool
    """False when the store already held it."""


def publish(store: "Store", parts: Parts, *, rejects: Path, rejected: int, profile: Mapping[str, Any]) -> DatasetFolder:
    """Write the dataset's folder, or nothing when the store holds these records already. `rejected` is the number of
    rows that `rejects` lists.

    The profile and the rejects beside some records are those of the first run that publishes them. If two runs publish
    at once, profile and rejects may come from different ones.
    """
    key = f"datasets/{parts.dataset_id}"
    folder = DatasetFolder(parts.dataset_id, store.uri(key), created=True)
    present = DatasetFolder(parts.dataset_id, store.uri(key), created=False)
    if folders.find_manifest(store, key) is not None:
        return present
    files: dict[str, bytes | Path] = {
        **{path: file for split in parts.splits for path, file in split.files.items()},
        REJECTS: rejects,
        "profile.json": json.dumps(profile, ensure_ascii=False, indent=2).encode(),
    }
    about = {
        "kind": "dataset",
        "format": FORMAT,
        "dataset_id": parts.dataset_id,
        **{f"{split.name}_records": len(split) for split in parts.splits},
        "rejected": rejected,
    }
    try:
        folders.publish(store, key, files, about=about, identity=(), apart=[TOKENS])
    except Conflict:
        # Another run published the same records meanwhile, with a profile of its own: either will do.
        logger.info("%s was published by another run at the same time", folder.uri)
        return present
    return folder


class _Writer:
    """Writes batches into one part after the other."""

    def __init__(self, folder: Path, columns: Set[str]) -> None:
        folder.mkdir(parents=True)
        self.paths: list[Path] = []
        self.records = 0
        self._folder, self._columns = folder, columns
        self._open: Any = None
        self._in_part = self._bytes = 0
        self._pending: list[pa.RecordBatch] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.paths and not any(error):
            from components.prepare.arrow_records import batch_of

            self._append(batch_of([]))
        self._close()

    def write(self, batch: "pa.RecordBatch") -> None:
        """Append the batch, which has all columns, to the open part, and to new parts once that is full."""
        import numpy as np

        while len(batch):
            ends = self._bytes + np.cumsum(sizes(batch).to_numpy(zero_copy_only=False))
            room = min(MOST_RECORDS - self._in_part, int(np.searchsorted(ends, MOST_BYTES)) + 1, len(batch))
            self._append(batch.slice(0, room))
            self._in_part += room
            self._bytes = int(ends[room - 1])
            if self._in_part >= MOST_RECORDS or self._bytes >= MOST_BYTES:
                self._close()
            batch = batch.slice(room)

    def _append(self, batch: "pa.RecordBatch") -> None:
        import pyarrow.parquet as pq

        batch = with_columns(batch, self._columns)
        if self._open is None:
            self.paths.append(self._folder / f"part-{len(self.paths):05}.parquet")
            self._open = pq.ParquetWriter(self.paths[-1], batch.schema, compression="zstd")
        self._pending.append(batch)
        self.records += len(batch)
        if sum(each.nbytes for each in self._pending) >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            self._open.write_table(pa.Table.from_batches(self._pending).combine_chunks())
            self._pending = []

    def _close(self) -> None:
        if self._open is not None:
            self._flush()
            self._open.close()
        self._open, self._in_part, self._bytes = None, 0, 0
