import hashlib
import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.prepare import workspace
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from components.prepare.workspace import opened, position, positions
from components.shared.errors import FineloopError


def test_a_disk_that_is_full_is_an_error_that_says_where(write_rows: Callable[..., str], run_config) -> None:
    long = "".join(map(str, range(20_000)))
    config = run_config(write_rows([{"prompt": f"{number} {long}", "completion": "a"} for number in range(60)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # as ENOSPC does, it fails a write
    try:
        with (
            pytest.raises(FineloopError, match=r"fineloop-prepare-.*: free some space there, or choose another folder"),
            preview(config, find_sources(config.data.source)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_left_of_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(memory_bytes=2**29) as work:
        work.finish()
        assert [path.parent for path in tmp_path.rglob("records.parquet")] == [work.folder]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bucket", "most", "chosen"), [(2**25, 200, 700), (1000, 5, 0), (1, 3, 700), (50, 200, 1)])
def test_rows_come_in_the_order_asked_for_however_little_is_held(bucket, most, chosen, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(workspace, "BUCKET_BYTES", bucket)
    monkeypatch.setattr(workspace, "MOST_BUCKETS", most)
    rng = random.Random(0)
    texts = ["x" * rng.choice((0, 1, 10, 500)) + str(number) for number in range(1000)]
    lists = [[text] * (number % 3) for number, text in enumerate(texts)]
    table = pa.table({"text": texts, "list": lists, "unread": lists})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=64)
    numbers = rng.sample(range(1000), chosen)
    sizes = np.array(list(map(len, texts)))
    batches = list(workspace.in_order(tmp_path / "rows.parquet", np.array(numbers, np.int64), sizes, ["text", "list"]))
    found = [row for batch in batches for row in batch.to_pylist()]
    assert found == [{"text": texts[number], "list": lists[number]} for number in numbers]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_the_positions_of_many_hashes_are_those_of_each() -> None:
    hashes = [hashlib.sha256(str(number).encode()).digest() for number in range(1000)]
    hashes += [bytes(32), b"\xff" * 32, b"\x80" + bytes(31)]
    column = pa.array(hashes, pa.binary(32))
    is_kept = pa.array([number % 3 == 0 for number in range(len(column))])
    for part in (column, column[7:], column[:0], column[5:9], column.filter(is_kept), pa.array([], column.type)):
        assert positions(part).tolist() == [position(place) for place in part.to_pylist()]
