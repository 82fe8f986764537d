import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.prepare import workspace


@pytest.mark.parametrize(
    ("bucket", "most", "pending"), [(2**25, 200, 2**25), (1000, 5, 2000), (1, 3, 1), (50, 200, 10**6)]
)
@pytest.mark.parametrize("chosen", [0, 1, 700])
def test_rows_come_in_the_order_asked_for_however_little_is_held(
    bucket: int, most: int, pending: int, chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "BUCKET_BYTES", bucket)
    monkeypatch.setattr(workspace, "MOST_BUCKETS", most)
    monkeypatch.setattr(workspace, "PENDING_BYTES", pending)
    rng = random.Random(0)
    texts = ["x" * rng.choice((0, 1, 10, 500)) + str(number) for number in range(1000)]
    lists = [[text] * (number % 3) for number, text in enumerate(texts)]
    pq.write_table(
        pa.table({"text": texts, "list": lists, "unread": lists}), tmp_path / "rows.parquet", row_group_size=64
    )
    numbers = rng.sample(range(1000), chosen)
    sizes = np.array(list(map(len, texts)))
    batches = list(workspace.in_order(tmp_path / "rows.parquet", np.array(numbers, np.int64), sizes, ["text", "list"]))
    found = [row for batch in batches for row in batch.to_pylist()]
    assert found == [{"text": texts[number], "list": lists[number]} for number in numbers]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]
