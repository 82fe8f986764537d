"""Small files that unpack to more than any machine has: prepare says so, and takes no more than it was given.

Each is read in a process of its own, which a limit that failed to hold would take down alone.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOM = 768 * 2**20
OF_ARROW = 2**30
"""Its allocator takes a GiB of addresses when it begins, and little of it."""
SMALL = 1_000_000
PREPARE = """
import resource, sys
import pyarrow.parquet as pq
from components.config.schema import RunConfig
from components.prepare.prepare import MEMORY_SHARE, preview
from components.prepare.sources import find_sources
from components.shared import machine
from components.shared.errors import DataError

machine.available_bytes = lambda: int(int(sys.argv[2]) / MEMORY_SHARE)
pq.ParquetFile(sys.argv[3]).close()  # Arrow has what it takes once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = {"adapter": {"name": "a"}, "model": {"base": "b"}, "data": {"source": sys.argv[1]}}
try:
    with preview(RunConfig.model_validate(config), find_sources(sys.argv[1])):
        pass
except DataError as exc:
    print(exc)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
ANSWER = pa.array(["y"])


def one_value_many_times() -> pa.Table:
    """40 GB: a row is its number in the dictionary."""
    rows = pa.array([0] * 4096, pa.int32())
    return pa.table({
        "prompt": pa.DictionaryArray.from_arrays(rows, pa.array(["x" * 10_000_000])),
        "completion": pa.DictionaryArray.from_arrays(rows, ANSWER),
    })  # fmt: skip


def one_long_text() -> pa.Table:
    return pa.table({"prompt": pa.array(["x" * 1_000_000_000]), "completion": ANSWER})


def one_long_list() -> pa.Table:
    length = 100_000_000
    prompt = pa.ListArray.from_arrays(pa.array([0, length], pa.int32()), pa.nulls(length, pa.string()))
    return pa.table({"prompt": prompt, "completion": ANSWER})


def many_empty_rows() -> pa.Table:
    """A table in which each row is a reject: 600 MB, if all of them were held."""
    return pa.table({name: pa.nulls(1_000_000, pa.string()) for name in ("prompt", "completion")})


@pytest.mark.parametrize(
    "bomb",
    [
        one_value_many_times,
        pytest.param(one_long_list, marks=pytest.mark.slow),
        pytest.param(one_long_text, marks=pytest.mark.full),
    ],
)
def test_a_parquet_file_that_unpacks_to_more_than_memory_is_an_error_and_takes_no_more(
    bomb: Callable[[], pa.Table], tmp_path: Path
) -> None:
    message, taken = prepared(bomb(), tmp_path, use_dictionary=bomb is not one_long_text)
    assert "do not fit into the 0.8 GiB of memory that are free for them: name fewer or smaller files" in message
    assert taken < ROOM + OF_ARROW


@pytest.mark.slow
def test_rows_that_are_all_unusable_take_no_memory_each(tmp_path: Path) -> None:
    message, taken = prepared(many_empty_rows(), tmp_path)
    assert "no usable row among 1,000,000:" in message
    assert taken < 256 * 2**20


def prepared(table: pa.Table, tmp_path: Path, *, use_dictionary: bool = True) -> tuple[str, int]:
    """What preparing these rows says in the end, and the bytes that it took."""
    path, plain = tmp_path / "bomb.parquet", tmp_path / "plain.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=use_dictionary)
    pq.write_table(pa.table({"completion": ANSWER}), plain)
    assert path.stat().st_size < SMALL
    command = [sys.executable, "-c", PREPARE, str(path), str(ROOM), str(plain)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    message, *_, taken = done.stdout.splitlines()
    return message, int(taken)
