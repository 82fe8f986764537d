"""Against a double of the Hugging Face hub on loopback, which answers what huggingface_hub asks for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.prepare import sources
from components.shared.errors import DataError
from tests.doubles.hub import COMMIT, serving

READ = """
import json, sys
from components.prepare import sources
from components.prepare.prepare import read_sources
from components.shared.errors import DataError
said = []
for entry in sys.argv[1:]:
    try:
        found = sources.find_sources(entry)
        answers = []
        read_sources(found, lambda batch: answers.extend(batch["answer"].to_pylist()), print)
        said.append([[each.name for each in found], answers])
    except DataError as exc:
        said.append(str(exc))
print(json.dumps(said))
"""
ROW = '{"question": "a", "answer": "%s"}\n'
Ask = Callable[..., list[object]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """In a process of its own, as huggingface_hub reads its settings when it is imported."""

    def asked(*entries: str, endpoint: str, **variables: str) -> list[object]:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **variables}
        command = [sys.executable, "-c", READ, *entries]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said: list[object] = json.loads(done.stdout.splitlines()[-1])
        return said

    return asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "served"
    for name, answer in {"main/train-0.jsonl": "m", "main/test-0.jsonl": "t", "socratic/train-0.jsonl": "s"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(ROW % answer)
    (root / "README.md").write_text("about")
    (root / "dataset_infos.json").write_text("{}")
    return root


def test_the_training_files_of_a_data_set_are_read_at_one_commit(ask: Ask, folder: Path) -> None:
    with serving("org/name", folder, "datasets") as served:
        globbed, named = "hf://datasets/org/name@v1/main/train-*.jsonl", "hf://org/name/main/test-0.jsonl"
        at = f"hf://datasets/org/name@{COMMIT}/main"
        train = [[f"{at}/train-0.jsonl"], ["m"]]
        assert ask("hf://org/name/main", globbed, named, endpoint=served.url) == [
            train,
            train,
            [[f"{at}/test-0.jsonl"], ["t"]],
        ]
        assert served.sent == {"main/train-0.jsonl", "main/test-0.jsonl"}


def test_a_data_set_that_cannot_be_read_is_named_with_the_reason(ask: Ask, folder: Path) -> None:
    with serving("org/name", folder, "datasets") as served:
        entries = ("hf://org/name", "hf://org/other", "hf://org/name/none")
        several, refused, empty = map(str, ask(*entries, endpoint=served.url))
        assert "which has 2 folders of data: name one, such as hf://org/name/main, hf://org/name/socratic" in several
        assert "'hf://org/other', and the hub refuses it: " in refused
        assert "which has no data files" in empty


def test_without_a_hub_it_says_what_else_to_do(ask: Ask) -> None:
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        message = str(ask("hf://org/name", endpoint="http://127.0.0.1:9", **settings))
        assert "'hf://org/name', and the hub cannot be reached" in message
        assert "copy the data set's files here or to S3" in message


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'fineloop\[hub\]'"):
        sources.find_sources("hf://org/name")


@pytest.mark.parametrize("entry", ["hf://", "hf://name", "hf://org/name@"])
def test_an_address_that_is_none_is_named(entry: str) -> None:
    with pytest.raises(DataError, match=r"expected hf://ORG/NAME"):
        sources.find_sources(entry)
