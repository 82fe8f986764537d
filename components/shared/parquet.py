"""Parquet files that are small enough to lie in memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def table_of(body: bytes) -> "pa.Table":
    """The table that the file's bytes hold, read by this thread alone.

    `pq.read_table` reads in threads of Arrow's, and one of them may let go of the bytes after it has returned. Where
    the process ends just then, CPython before 3.14 ends that thread inside C++, and the command aborts: exit code 134.

    Raises:
        pa.ArrowInvalid: it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(body)) as file:
        return file.read(use_threads=False)
