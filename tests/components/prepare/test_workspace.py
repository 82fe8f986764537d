import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from components.config.schema import RunConfig
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from components.prepare.workspace import opened
from components.shared.errors import FineloopError


def test_a_disk_that_is_full_is_an_error_that_says_where(
    write_rows: Callable[..., str], run_config: Callable[..., RunConfig]
) -> None:
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
