"""The command line as a process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docs.json_keys import FREE, JSON_KEYS

ROOT = Path(__file__).resolve().parents[2]


def fineloop(
    *arguments: str | Path, cwd: Path, typed: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )


def body(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    require_documented(done.args[done.args.index("pipelines.cli") + 1 :], loaded)
    return loaded


def require_documented(arguments: Sequence[str], printed: dict[str, Any]) -> None:
    """docs/cli.md names the keys that a command prints with --json."""
    command = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in {*JSON_KEYS, *FREE})
    if "error" not in printed and command not in FREE:
        assert set(printed) <= set(JSON_KEYS[command].split())
