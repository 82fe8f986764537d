"""Reads Parquet files that are small enough to fit in memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def table_of(body: bytes) -> "pa.Table":
    """Read the table from the file's bytes, in this thread alone.

    `pq.read_table` reads in Arrow's threads, and one of them may release the bytes after it has returned. If the
    process ends just then, CPython before 3.14 ends that thread inside C++, and the command aborts: exit code 134.
    Raises pa.ArrowInvalid: the bytes are not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(body)) as file:
        return file.read(use_threads=False)
