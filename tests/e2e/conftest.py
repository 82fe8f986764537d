"""The command line as a user types it, in a home of the tests' own."""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.store.store import Store
from tests.journeys.conftest import Done, Person
from tests.models.tiny import build_base, colour_rows

CHECKOUT = Path(__file__).parents[2]


def settings(keys: Mapping[str, object]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Home:
    """One home, and the commands run on it."""

    path: Path

    def command(self, *arguments: str) -> list[str]:
        return ["fineloop", *arguments, "--home", str(self.path), "--json"]

    def fineloop(self, *arguments: str, **environment: str) -> Done:
        return Person(self.path.parent, environment).types(shlex.join(self.command(*arguments)))

    def does(self, *arguments: str, **environment: str) -> Done:
        """A command that must end well."""
        return Person(self.path.parent, environment).does(shlex.join(self.command(*arguments)))

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
        self.home.does("ray", "up", **environment)
        yield
        self.home.does("ray", "down")

    @property
    def settings(self) -> list[str]:
        """The options that turn the example into this task."""
        keys = {"adapter.name": "colours", "model.base": self.base, "model.max_length": 64, "data.source": self.data}
        keys |= {"data.max_records": 0, "data.window_days": 0, "data.replay_share": 0, "train.start_from": "base"}
        keys |= {"train.learning_rate": 0.01, "train.epochs": 4, "evaluate.max_new_tokens": 8}
        return settings(keys)
