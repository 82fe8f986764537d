"""Keeps records on disk while a dataset is made of them, and queries them with DuckDB, within a memory limit.

Each step keeps its decisions in tables of the records' numbers and hashes, which DuckDB sorts and joins on disk where
they do not fit into memory. The records themselves stay in a file, and are read in another order once that is known.
A few numbers per record are in memory.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.prepare import dataset
from components.prepare.dataset import Reject
from components.shared.machine import usable_cores
from components.store.client import disk_errors

# Reads the rows of a file in another order, in little memory however many and however long they are: DuckDB would hold
# a vector of 2,048 of them at least.
#
# The target place of each row is known, so two passes are enough: the first writes each row to the bucket of its target
# place, the second reads one bucket after the other and sorts it. A bucket holds some tens of megabytes.

BUCKET_BYTES, MOST_BUCKETS = 2**25, 200
_RANK = "rank"


def in_order(
    path: Path, numbers: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield columns of the rows of a Parquet file that `numbers` lists, counted from 0, in the order of `numbers`.
    `sizes` are the approximate bytes of every row of the file."""
    rank = np.full(len(sizes), -1, np.int64)
    rank[numbers] = np.arange(len(numbers))
    ends = np.cumsum(sizes[numbers])
    total = int(ends[-1]) if len(ends) else 0
    bucket_of = (ends - 1) // max(BUCKET_BYTES, -(-total // MOST_BUCKETS))
    with tempfile.TemporaryDirectory(prefix="order-", dir=path.parent) as folder:
        writers: dict[int, Any] = {}
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        for table in _ranked(path, rank, columns):
            buckets = bucket_of[table[_RANK].to_numpy()]
            for bucket in np.unique(buckets).tolist():
                part = table.filter(pa.array(buckets == bucket))
                if bucket not in writers:
                    writers[bucket] = pa.ipc.new_stream(f"{folder}/{bucket}", part.schema, options=options)
                writers[bucket].write_table(part)
        for bucket, writer in sorted(writers.items()):
            writer.close()
            with pa.OSFile(f"{folder}/{bucket}") as file:
                table = pa.ipc.open_stream(file).read_all()
            ordered = table.take(np.argsort(table[_RANK].to_numpy(), kind="stable")).drop_columns(_RANK)
            yield from ordered.combine_chunks().to_batches(max_chunksize=2048)


def _ranked(path: Path, rank: npt.NDArray[np.int64], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows that have a rank, with the rank as a column, one row group at a time."""
    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            here = rank[start : start + file.metadata.row_group(group).num_rows]
            start += len(here)
            kept = np.flatnonzero(here >= 0)
            if len(kept):
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
                yield table.take(kept).append_column(_RANK, pa.array(here[kept]))


OF_DUCKDB = 0.4
"""DuckDB's share of a workspace's memory. The rest is for Python: Arrow's batches and the comparison of prompts."""
LEAST_OF_A_THREAD = 2**27
"""Bytes without which DuckDB cannot sort on another thread."""
ENOUGH, ENOUGH_BYTES = 8192, 2**24
"""Records, or bytes of them, that are enough to write a batch."""
_BATCH = 4096
_OTHER_BYTES = 100
"""Approximate bytes of a record beside its prompt and answer."""


class Workspace:
    """The records and rejects of one preparation, in the order in which they were read."""

    def __init__(self, folder: Path, *, memory_bytes: int) -> None:
        import duckdb  # which takes a tenth of a second, and jobs that only read datasets do without

        self.folder = folder
        self.columns: set[str] = set()
        """The optional columns (NOT_ALWAYS) that any record needs."""
        self.rejects = folder / "rejects.parquet"
        """The file of all rejects."""
        self._path = folder / "records.parquet"
        kinds = {"source": pa.string(), "line": pa.int64(), "reason": pa.string(), "row": pa.string()}
        self._reject_writer = pq.ParquetWriter(self.rejects, pa.schema(kinds), compression="zstd")
        keyed = dataset.keyed_batch(dataset.batch_of([]), dataset.Hashes([], [], [], []), []).schema
        schema = pa.schema([("number", pa.int64()), ("position", pa.float64()), *keyed])
        self._writer = pq.ParquetWriter(
            self._path, schema, compression="lz4", use_dictionary=False, write_statistics=False
        )
        self._pending: list[pa.RecordBatch] = []
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._pending_rejects: list[Reject] = []
        for_duckdb = int(OF_DUCKDB * memory_bytes)
        self._duckdb = duckdb.connect(
            config={
                "memory_limit": f"{for_duckdb}B",
                "threads": max(1, min(usable_cores(), for_duckdb // LEAST_OF_A_THREAD)),
                "temp_directory": str(folder / "duckdb"),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )

    def accept(self, records: pa.RecordBatch) -> None:
        """Add some records, with the columns of `keyed_batch`."""
        self._pending.append(records)
        if sum(map(len, self._pending)) >= ENOUGH or sum(batch.nbytes for batch in self._pending) >= ENOUGH_BYTES:
            self._write()

    def reject(self, reject: Reject) -> None:
        self._pending_rejects.append(reject)
        if len(self._pending_rejects) == _BATCH:
            self._write_rejects()

    def finish(self) -> None:
        """End the input: the records that were added become the view `records`."""
        self._write()
        self._write_rejects()
        self._writer.close()
        self._reject_writer.close()
        self.run(f"CREATE VIEW records AS FROM read_parquet({quoted(self._path)})")

    def numbers(self, query: str) -> npt.NDArray[np.int64]:
        """The result of a query with one column of integers."""
        parts = [batch.column(0).to_numpy() for batch in self.batches(query)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def in_order(self, numbers: npt.NDArray[np.int64], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of the records with these numbers, in the order of the numbers."""
        return in_order(self._path, numbers, np.concatenate([np.zeros(0, np.int64), *self._sizes]), columns)

    def run(self, statement: str) -> None:
        with _own_errors():
            self._duckdb.execute(statement)

    def row(self, query: str) -> tuple[Any, ...]:
        (row,) = self.rows(query)
        return row

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query's result, which has few."""
        with _own_errors():
            return list(self._duckdb.execute(query).fetchall())

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """Yield a query's result in batches; no other statement may run until it ends."""
        with _own_errors():
            yield from self._duckdb.sql(query).to_arrow_reader(_BATCH)

    def put(self, name: str, **columns: pa.Array) -> None:
        table = pa.table(columns)
        with _own_errors():
            self._duckdb.register("arrow_table", table)
            self._duckdb.execute(f"CREATE TABLE {name} AS FROM arrow_table")
            self._duckdb.unregister("arrow_table")

    def close(self) -> None:
        self._duckdb.close()

    def _write(self) -> None:
        if not self._pending:
            return
        batch = pa.concat_batches(self._pending)
        self.columns |= dataset.present(batch)
        first = sum(map(len, self._sizes))
        self._sizes.append(dataset.sizes(batch).to_numpy(zero_copy_only=False) + _OTHER_BYTES)
        columns = {
            "number": pa.array(np.arange(first, first + len(batch))),
            "position": pa.array(positions(batch["place"])),
            **dict(zip(batch.schema.names, batch.columns, strict=True)),
        }
        self._writer.write_batch(pa.record_batch(columns))
        self._pending = []

    def _write_rejects(self) -> None:
        rows = [asdict(reject) for reject in self._pending_rejects]
        self._reject_writer.write_batch(pa.RecordBatch.from_pylist(rows, self._reject_writer.schema))
        self._pending_rejects = []


@contextlib.contextmanager
def opened(*, memory_bytes: int) -> Iterator[Workspace]:
    """Open a workspace in a new temporary folder, which is removed afterwards. Raises FineloopError: the disk under the
    folder for temporary files is full."""
    with tempfile.TemporaryDirectory(prefix="fineloop-prepare-") as folder, disk_errors(folder):
        workspace = Workspace(Path(folder), memory_bytes=memory_bytes)
        try:
            yield workspace
        finally:
            workspace.close()


def position(place: bytes) -> float:
    """Where a hash lies among all hashes, in [0, 1]."""
    return int.from_bytes(place[:8]) / 2**64


def positions(hashes: pa.FixedSizeBinaryArray) -> npt.NDArray[np.float64]:
    """The `position` of each of these sha256."""
    if not len(hashes):
        return np.zeros(0)
    words = np.frombuffer(hashes.buffers()[1], ">u8").reshape(-1, 4)
    first = words[hashes.offset : hashes.offset + len(hashes), 0]
    places: npt.NDArray[np.float64] = first / 2.0**64
    return places


def quoted(path: Path) -> str:
    """The path as a string literal of SQL."""
    return "'" + str(path).replace("'", "''") + "'"


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise DuckDB's out-of-memory errors as MemoryError, and its I/O errors as OSError."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as exc:
        raise MemoryError(str(exc)) from exc
    except duckdb.IOException as exc:
        raise OSError(str(exc)) from exc


class Texts(Sequence[str]):
    """Texts in a file, with 16 bytes of memory for each."""

    def __init__(self, path: Path, batches: Iterable[Sequence[str]]) -> None:
        self._path, parts = path, [np.zeros(0, np.int64)]
        with path.open("wb") as file:
            for texts in batches:
                encoded = [text.encode() for text in texts]
                parts.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
                file.write(b"".join(encoded))
        self._sizes = np.concatenate(parts)
        self._begins = np.cumsum(self._sizes) - self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, place: Any) -> Any:
        with self._path.open("rb") as file:
            file.seek(self._begins[place])
            return file.read(self._sizes[place]).decode()

    def __iter__(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for size in self._sizes.tolist():
                yield file.read(size).decode()
