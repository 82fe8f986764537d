import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[3]
THREADS = """
import os, sys
import pyarrow.parquet
from components.shared.parquet import table_of
body = open(sys.argv[1], "rb").read()
before = os.listdir("/proc/self/task")
assert table_of(body).num_rows == 500
assert os.listdir("/proc/self/task") == before
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
def test_no_thread_of_arrows_holds_the_bytes_when_the_process_ends(tmp_path: Path) -> None:
    table = pa.table({"loss": [number / 7 for number in range(500)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "t.parquet")], check=True, cwd=ROOT)
