"""Reads the rows of a file in another order, in little memory however many and however long they are.

The target place of each row is known, so two passes are enough: the first writes each row to the bucket of its target
place, the second reads one bucket after the other and sorts it. A bucket holds some tens of megabytes.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

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
