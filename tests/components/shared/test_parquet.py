import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.shared.parquet import table_of

ROOT = Path(__file__).resolve().parents[3]
THREADS = """
import os, sys
import pyarrow.parquet
from components.shared.parquet import table_of
body = open(sys.argv[1], "rb").read()
before = os.listdir("/proc/self/task")
table_of(body)
assert os.listdir("/proc/self/task") == before
"""


TABLE = pa.table({"id": [f"r{number}" for number in range(500)], "loss": [number / 7 for number in range(500)]})


@pytest.fixture
def body() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=100)
    return sink.getvalue()


def test_a_table_is_what_was_written(body: bytes) -> None:
    assert table_of(body).equals(TABLE)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
def test_no_thread_of_arrows_holds_the_bytes_when_the_process_ends(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(body)
    subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "t.parquet")], check=True, cwd=ROOT)
