import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RunConfig


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write objects (or raw text or bytes) as the lines of a file; gives its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        lines = [text.encode() if isinstance(text, str) else text for text in texts]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """A config with this `data` section."""

    def build(source: str | list[str], **data: Any) -> RunConfig:
        about = {"adapter": {"name": "test"}, "model": {"base": "org/model"}}
        return RunConfig.model_validate({**about, "data": {"source": source, **data}})

    return build
