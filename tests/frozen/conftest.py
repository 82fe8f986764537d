"""A fresh copy of a release's registry for each test, and a cache for its base."""

from pathlib import Path
from typing import Any

import pytest

from tests.frozen.registry import BUCKET, RELEASES, Frozen, restored


@pytest.fixture(params=RELEASES)
def frozen(request: pytest.FixtureRequest, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    assert s3_server.bucket == BUCKET
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    return restored(request.param)
