import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.shared.errors import ObjectMissing
from components.store.store import ObjectFile, Store


def test_an_object_reads_like_the_file_that_holds_the_same_bytes(store: Store) -> None:
    body, choose = random.Random(0).randbytes(10_000), random.Random(1)
    store.put("x", body)
    judge, found = io.BytesIO(body), ObjectFile(store, "x", len(body))
    for _ in range(60):
        if choose.random() < 0.5:
            place, whence = choose.choice([(choose.randrange(12_000), 0), (-choose.randrange(9_000), 2)])
            assert found.seek(place, whence) == judge.seek(place, whence)
        size = choose.choice([0, 1, 100, 5_000, 20_000, -1, None])
        assert found.read(size) == judge.read(size)
        assert found.tell() == judge.tell()


def test_of_a_parquet_file_one_column_is_fetched(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random.Random(n).randbytes(500).hex() for n in range(5_000)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [str(n) for n in range(5_000)], "text": texts}), sink, compression="zstd")
    store.put("x.parquet", sink.getvalue())
    fetched: list[int] = []
    part = Store.part

    def counting(self: Store, key: str, start: int, size: int) -> bytes:
        fetched.append(size)
        return part(self, key, start, size)

    monkeypatch.setattr(Store, "part", counting)
    with pq.ParquetFile(ObjectFile(store, "x.parquet", len(sink.getvalue()))) as file:
        assert file.read(columns=["id"])["id"].to_pylist() == [str(n) for n in range(5_000)]
    assert sum(fetched) < len(sink.getvalue()) / 20


def test_an_object_that_is_gone_is_missing(store: Store) -> None:
    with pytest.raises(ObjectMissing):
        ObjectFile(store, "none", 10).read()
