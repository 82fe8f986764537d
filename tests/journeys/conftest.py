"""A person at a terminal: a folder of their own, the commands that the documentation shows, and what they read.

Each journey is one file that reads from top to bottom. Its commands are real ones, its store and its Ray are real, and
its judges come from outside of Fineloop: each test names its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import build_base, colour_rows

# What a developer's shell may hold would win over the embedded store and Ray head.
CONFIGURED = ("AWS_", "RAY_", "FINELOOP_")
COLOURS_TOML = """\
[adapter]
name = "colours"
[model]
base = {base}
max_length = 64
[data]
source = {data}
[train]
learning_rate = 0.01
epochs = 4
[evaluate]
max_new_tokens = 8
"""


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    screen: str
    """stderr: what a person reads while it runs."""

    @property
    def answer(self) -> dict[str, Any]:
        return json.loads(self.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Person:
    """Somebody in a folder, whose home is ./.fineloop there, as it is for who names none."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    """Exported in their shell."""

    @property
    def home(self) -> Path:
        return self.folder / ".fineloop"

    @property
    def environment(self) -> dict[str, str]:
        """Their shell's, with the installed `fineloop` first on the path."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURED)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**clean, "PATH": path, **self.variables}

    def with_variables(self, **variables: str) -> "Person":
        return Person(self.folder, {**self.variables, **variables})

    def starts(self, line: str, **how: Any) -> "subprocess.Popen[Any]":
        """One line of shell that goes on beside others; `how` is of subprocess.Popen."""
        return subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.folder, **{"env": self.environment, **how})

    def types(self, line: str, *, typed: str = "") -> Done:
        """One line of shell, however it ends."""
        where = {"cwd": self.folder, "env": self.environment}
        done = subprocess.run(["bash", "-c", line], **where, input=typed, capture_output=True, text=True, timeout=900)
        return Done(done.returncode, done.stdout, done.stderr)

    def does(self, line: str, *, typed: str = "") -> Done:
        """One line of shell that must end well."""
        done = self.types(line, typed=typed)
        assert done.exit_code == 0, f"{line}\n{done.stdout}\n{done.screen}"
        return done

    def has(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def has_colours(self, name: str = "colours.toml", *, rows: int = 400, more: str = "") -> Path:
        """A tiny base, rows of a task that it can learn, and a config: a run of it takes a minute."""
        base = self.folder / "base"
        if not base.exists():
            build_base(base)
        data = self.has(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in colour_rows(rows)))
        return self.has(name, COLOURS_TOML.format(base=json.dumps(str(base)), data=json.dumps(str(data))) + more)


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Somebody in a fresh folder; what their home started is stopped at the end."""
    somebody = Person(tmp_path_factory.mktemp("person"))
    yield somebody
    somebody.types("fineloop ray down")
    somebody.types("fineloop store down")
