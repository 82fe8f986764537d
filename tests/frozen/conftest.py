"""A fresh copy of a release's registry for each test, and a cache for its base."""

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frozen.registry import BUCKET, RELEASES, Frozen, restored


@pytest.fixture(params=RELEASES)
def frozen(
    request: pytest.FixtureRequest, s3_server: Any, s3_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Frozen]:
    assert s3_server.bucket == BUCKET
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    with (s3_home / "frozen.lock").open("w") as alone:  # its records name its place in the store, which is one for all
        fcntl.flock(alone, fcntl.LOCK_EX)
        yield restored(request.param)
