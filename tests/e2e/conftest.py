"""The command line as a user types it, in a home of the tests' own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.store.store import Store
from tests.journeys.conftest import CONFIGURED
from tests.models.tiny import build_base, colour_rows

FINELOOP = str(Path(sys.executable).parent / "fineloop")
CHECKOUT = Path(__file__).parents[2]


def settings(keys: Mapping[str, object]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Done:
    exit_code: int
    answer: dict[str, Any]
    """The last line of stdout."""
    stderr: str


@dataclass(frozen=True)
class Home:
    """One home, and the commands run on it."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURED)}

    def command(self, *arguments: str) -> list[str]:
        return [FINELOOP, *arguments, "--home", str(self.path), "--json"]

    def fineloop(self, *arguments: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
        done = subprocess.run(
            self.command(*arguments),
            env={**self.environment, **(environment or {})},
            cwd=cwd or self.path.parent,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        lines = done.stdout.splitlines()
        return Done(done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr)

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        """Its registry, whose store must be up; the environment points at it meanwhile."""
        with pytest.MonkeyPatch.context() as environment:
            for name, value in self.fineloop("store", "env").answer.items():
                environment.setenv(name, value)
            yield Store.open(RegistryConfig())


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The home of the runs on the real model."""
    return Home(tmp_path_factory.mktemp("real") / "home")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":
    """A home, a tiny base and data for it: the whole machinery in seconds of training."""
    return Tiny.made(tmp_path_factory.mktemp("tiny"), rows=400)


@pytest.fixture(scope="session")
def up(tiny: "Tiny") -> Iterator[dict[str, str]]:
    """Its store and Ray head, up for every test that does not stop them; what a client needs to use them."""
    with tiny.is_up():
        yield {**tiny.home.fineloop("store", "env").answer, **tiny.home.fineloop("ray", "env").answer}


@pytest.fixture(scope="module")
def store(tiny: "Tiny", up: dict[str, str]) -> Iterator[Store]:
    with tiny.home.store() as store:
        yield store


@dataclass(frozen=True)
class Tiny:
    """The tiny base with its data."""

    home: Home
    base: Path
    data: Path

    @classmethod
    def made(cls, directory: Path, *, rows: int, **base: int) -> "Tiny":
        data = directory / "colours.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(rows)))
        return cls(Home(directory / "home"), build_base(directory / "base", **base), data)

    @contextlib.contextmanager
    def is_up(self, **environment: str) -> Iterator[None]:
        started = self.home.fineloop("ray", "up", environment=environment)
        assert started.exit_code == 0, started.stderr
        yield
        assert self.home.fineloop("ray", "down").exit_code == 0

    @property
    def settings(self) -> list[str]:
        """The options that turn the example into this task."""
        keys = {
            "model.base": self.base,
            "model.max_length": 64,
            "data.source": self.data,
            "data.max_records": 0,
            "data.window_days": 0,
            "data.replay_share": 0,
            "adapter.name": "colours",
            "train.start_from": "base",
            "train.learning_rate": 0.01,
            "train.epochs": 4,
            "evaluate.max_new_tokens": 8,
        }
        return settings(keys)
