"""Keeps records on disk while a dataset is made of them, and queries them with DuckDB, within a memory limit.

Each step keeps its decisions in tables of the records' numbers and hashes, which DuckDB sorts and joins on disk where
they do not fit into memory. The records themselves stay in a file, and are read in another order once that is known.
A few numbers per record are in memory.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.prepare import dataset
from components.prepare.dataset import Reject
from components.shared.machine import usable_cores
from components.store.client import disk_errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa


# Reads the rows of a file in another order, in little memory however many and however long they are.
#
# The target place of each row is known, so two passes are enough: the first writes each row to the bucket of its target
# place, the second reads one bucket after the other and sorts it. A bucket holds some tens of megabytes.

BUCKET_BYTES, MOST_BUCKETS = 2**25, 200
PENDING_BYTES = 2**25
"""Bytes of rows to buffer before they are written to their buckets."""
_RANK = "rank"
_AT_ONCE = 2048


def in_order(
    path: Path, numbers: "npt.NDArray[np.int64]", sizes: "npt.NDArray[np.int64]", columns: Sequence[str]
) -> Iterator["pa.RecordBatch"]:
    """Yield columns of the rows of a Parquet file that `numbers` lists, counted from 0, in the order of `numbers`.
    `sizes` are the approximate bytes of every row of the file."""
    import numpy as np

    rank = np.full(len(sizes), -1, np.int64)
    rank[numbers] = np.arange(len(numbers))
    ends = np.cumsum(sizes[numbers])
    total = int(ends[-1]) if len(ends) else 0
    bucket_of = (ends - 1) // max(BUCKET_BYTES, -(-total // MOST_BUCKETS))
    del ends  # else 80 MB for ten million rows, while they are read
    with tempfile.TemporaryDirectory(prefix="order-", dir=path.parent) as folder:
        buckets = _Buckets(Path(folder))
        for table in _ranked(path, rank, columns):
            buckets.add(table, bucket_of[table[_RANK].to_numpy()])
        for table in buckets.tables():
            ordered = table.take(np.argsort(table[_RANK].to_numpy(), kind="stable")).drop_columns(_RANK)
            yield from ordered.combine_chunks().to_batches(max_chunksize=_AT_ONCE)


def _ranked(path: Path, rank: "npt.NDArray[np.int64]", columns: Sequence[str]) -> Iterator["pa.Table"]:
    """Yield the rows that have a rank, with the rank as a column, one row group at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            here = rank[start : start + file.metadata.row_group(group).num_rows]
            start += len(here)
            kept = np.flatnonzero(here >= 0)
            if not len(kept):
                continue
            table = file.read_row_group(group, columns=list(columns), use_threads=False)
            yield table.take(kept).append_column(_RANK, pa.array(here[kept]))


class _Buckets:
    """Rows by bucket: in memory while they are few, else in one file per bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[int, list[pa.Table]] = {}
        self._pending_bytes = 0
        self._writers: dict[int, Any] = {}

    def add(self, table: "pa.Table", bucket: "npt.NDArray[np.int64]") -> None:
        import numpy as np

        order = np.argsort(bucket, kind="stable")
        table = table.take(order)
        names, starts = np.unique(bucket[order], return_index=True)
        for name, start, end in zip(names.tolist(), starts, [*starts[1:], len(order)], strict=True):
            self._pending.setdefault(name, []).append(table.slice(start, end - start))
        self._pending_bytes += table.nbytes
        if self._pending_bytes >= PENDING_BYTES:
            self._flush()

    def tables(self) -> Iterator["pa.Table"]:
        """Yield the buckets in order, each as one table."""
        import pyarrow as pa

        if self._writers:
            self._flush()
        for writer in self._writers.values():
            writer.close()
        for name in sorted({*self._writers, *self._pending}):
            if name in self._pending:
                yield pa.concat_tables(self._pending.pop(name)).combine_chunks()
            else:
                with pa.OSFile(str(self._path(name))) as file:
                    yield pa.ipc.open_stream(file).read_all().combine_chunks()
                self._path(name).unlink()

    def _flush(self) -> None:
        import pyarrow as pa

        for name, tables in self._pending.items():
            if name not in self._writers:
                options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
                self._writers[name] = pa.ipc.new_stream(str(self._path(name)), tables[0].schema, options=options)
            self._writers[name].write_table(pa.concat_tables(tables).combine_chunks())
        self._pending, self._pending_bytes = {}, 0

    def _path(self, name: int) -> Path:
        return self._folder / f"{name}.arrow"


OF_DUCKDB = 0.4
"""DuckDB's share of a workspace's memory. The rest is for Python: Arrow's batches and the comparison of prompts."""
LEAST_OF_A_THREAD = 2**27
"""Bytes without which DuckDB cannot sort on another thread."""
ENOUGH, ENOUGH_BYTES = 8192, 2**24
"""Records, or bytes of them, that are enough to write a batch."""
MOST_REJECTS_AT_ONCE = 4096
_BATCH = 4096
_OTHER_BYTES = 100
"""Approximate bytes of a record beside its prompt and answer."""


class Workspace:
    """The records and rejects of one preparation, in the order in which they were read."""

    def __init__(self, folder: Path, *, memory_bytes: int) -> None:
        import duckdb

        self.folder = folder
        self.columns: set[str] = set()
        """The optional columns (NOT_ALWAYS) that any record needs."""
        self._records = _Spilled(
            folder / "records.parquet", compression="lz4", use_dictionary=False, write_statistics=False
        )
        self._rejects = _Spilled(folder / "rejects.parquet", compression="zstd")
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

    def accept(self, records: "pa.RecordBatch") -> None:
        """Add some records, with the columns of `keyed_batch`."""
        self._pending.append(records)
        if sum(map(len, self._pending)) >= ENOUGH or sum(each.nbytes for each in self._pending) >= ENOUGH_BYTES:
            self._write()

    def reject(self, reject: Reject) -> None:
        """Add one row that became no record."""
        self._pending_rejects.append(reject)
        if len(self._pending_rejects) == MOST_REJECTS_AT_ONCE:
            self._write_rejects()

    def finish(self) -> None:
        """End the input: the records that were added become the view `records`."""
        if self._pending or not self._sizes:
            self._write()
        self._write_rejects()
        self._records.close()
        self._rejects.close()
        self.run(f"CREATE VIEW records AS FROM read_parquet({quoted(self._records.path)})")

    def numbers(self, query: str, *values: Any) -> "npt.NDArray[np.int64]":
        """The result of a query with one column of integers."""
        import numpy as np

        parts = [batch.column(0).to_numpy() for batch in self.batches(query, *values)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def in_order(self, numbers: "npt.NDArray[np.int64]", columns: Sequence[str]) -> Iterator["pa.RecordBatch"]:
        """These columns of the records with these numbers, in the order of the numbers."""
        import numpy as np

        return in_order(self._records.path, numbers, np.concatenate(self._sizes), columns)

    @property
    def rejects(self) -> Path:
        """The file of all rejects."""
        return self._rejects.path

    def run(self, statement: str, *values: Any) -> None:
        """Execute one statement of SQL."""
        with _own_errors():
            self._duckdb.execute(statement, list(values))

    def row(self, query: str, *values: Any) -> tuple[Any, ...]:
        """The single row of a query's result."""
        rows = self.rows(query, *values)
        assert len(rows) == 1
        return rows[0]

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query's result, which has few."""
        with _own_errors():
            return list(self._duckdb.execute(query, list(values)).fetchall())

    def batches(self, query: str, *values: Any) -> Iterator["pa.RecordBatch"]:
        """Yield a query's result in batches; no other statement may run until it ends."""
        with _own_errors():
            reader = self._duckdb.sql(query, params=list(values) or None).to_arrow_reader(_BATCH)
            yield from reader

    def put(self, name: str, **columns: "pa.Array") -> None:
        """Make a table of these columns."""
        import pyarrow as pa

        given = pa.table(columns)
        with _own_errors():
            self._duckdb.register("given", given)
            self._duckdb.execute(f"CREATE TABLE {name} AS FROM given")
            self._duckdb.unregister("given")

    def close(self) -> None:
        """Close DuckDB, and release what it holds."""
        self._duckdb.close()

    def _write(self) -> None:
        import numpy as np
        import pyarrow as pa

        nothing = dataset.keyed_batch(dataset.batch_of([]), dataset.Hashes([], [], [], []), [])
        batch = pa.concat_batches(self._pending or [nothing])
        self.columns |= dataset.present(batch)
        first = sum(map(len, self._sizes))
        self._sizes.append(dataset.sizes(batch).to_numpy(zero_copy_only=False) + _OTHER_BYTES)
        columns = {
            "number": pa.array(np.arange(first, first + len(batch))),
            "position": pa.array(_positions(batch["place"])),
            **dict(zip(batch.schema.names, batch.columns, strict=True)),
        }
        self._records.write(pa.record_batch(columns))
        self._pending = []

    def _write_rejects(self) -> None:
        import pyarrow as pa

        rejects, self._pending_rejects = self._pending_rejects, []
        fields = {"source": pa.string(), "line": pa.int64(), "reason": pa.string(), "row": pa.string()}
        self._rejects.write(
            pa.record_batch({
                name: pa.array([getattr(each, name) for each in rejects], kind) for name, kind in fields.items()
            })
        )  # fmt: skip


class _Spilled:
    """A Parquet file that is written a batch at a time."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self._options = options
        self._writer: Any = None

    def write(self, batch: "pa.RecordBatch") -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, batch.schema, **self._options)
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def opened(*, memory_bytes: int) -> Iterator[Workspace]:
    """Open a workspace in a new temporary folder, which is removed afterwards.

    Raises:
        FineloopError: the disk under the folder for temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="fineloop-prepare-") as folder, disk_errors(folder):
        workspace = Workspace(Path(folder), memory_bytes=memory_bytes)
        try:
            yield workspace
        finally:
            workspace.close()


def quoted(path: Path) -> str:
    """The path as a string literal of SQL."""
    return "'" + str(path).replace("'", "''") + "'"


def _positions(places: "pa.FixedSizeBinaryArray") -> "npt.NDArray[np.float64]":
    """Where each hash lies among all hashes, as `split.position` computes it."""
    import numpy as np

    size = places.type.byte_width
    hashes = np.frombuffer(places.buffers()[1], np.uint8)[size * places.offset :][: size * len(places)]
    return hashes.reshape(-1, size)[:, :8].copy().view(">u8").ravel().astype(np.float64) / 2.0**64


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


# Keeps many texts in a file, with 24 bytes of memory for each.

BLOCK_BYTES = 2**20
"""The size of the blocks whose texts are read together, in bytes."""


class Texts(Sequence[str]):
    """Some of the texts of a file, in order."""

    def __init__(self, path: Path, begins: "npt.NDArray[np.int64]", sizes: "npt.NDArray[np.int64]") -> None:
        """`begins` are the texts' places in the file, `sizes` their lengths, both in bytes."""
        self._path, self._begins, self._sizes = path, begins, sizes

    @classmethod
    def write(cls, path: Path, batches: Iterable[Sequence[str]]) -> "Texts":
        """Write the texts to a new file."""
        import numpy as np

        parts = [np.zeros(0, np.int64)]
        with path.open("wb") as file:
            for texts in batches:
                encoded = [text.encode() for text in texts]
                parts.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
                file.write(b"".join(encoded))
        sizes = np.concatenate(parts)
        return cls(path, np.cumsum(sizes) - sizes, sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return list(self._read(self._begins[place], self._sizes[place]))
        (text,) = self._read(self._begins[place : place + 1], self._sizes[place : place + 1])
        return text

    def __iter__(self) -> Iterator[str]:
        return self._read(self._begins, self._sizes)

    def _read(self, begins: "npt.NDArray[np.int64]", sizes: "npt.NDArray[np.int64]") -> Iterator[str]:
        """Read the texts; those that follow each other in the same block of the file are read at once."""
        import numpy as np

        ends = begins + sizes
        follows = (begins[1:] == ends[:-1]) & (np.diff(begins // BLOCK_BYTES) == 0)
        first = np.flatnonzero(np.concatenate([[True], ~follows])) if len(sizes) else np.zeros(0, np.int64)
        with self._path.open("rb") as file:
            for start, end in zip(first.tolist(), [*first[1:].tolist(), len(sizes)], strict=False):
                file.seek(begins[start])
                read = file.read(int(ends[end - 1] - begins[start]))
                place = 0
                for size in sizes[start:end].tolist():
                    yield read[place : place + size].decode()
                    place += size
