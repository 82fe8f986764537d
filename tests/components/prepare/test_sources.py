import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.prepare import sources
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from components.store.store import Store
from tests.doubles.hub import COMMIT, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/c.parquet", "notes.txt", "_SUCCESS", ".cache/x.jsonl", "d.NDJSON"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    return tmp_path


def names(source: str | list[str], folder: Path) -> list[str]:
    return [str(Path(each.name).relative_to(folder)) for each in find_sources(source)]


def test_a_folder_gives_its_visible_data_files_sorted(folder: Path) -> None:
    assert names(str(folder), folder) == ["a.jsonl", "b.jsonl", "d.NDJSON", "deep/c.parquet"]


def test_a_file_whose_name_is_not_utf_8_is_named(folder: Path) -> None:
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.jsonl")).write_text("{}\n")
    with pytest.raises(DataError, match=r"caf\\udce9\.jsonl, whose name is not UTF-8: rename it"):
        find_sources(str(folder))


def test_a_glob_gives_what_matches_sorted(folder: Path) -> None:
    assert names(str(folder / "*.jsonl"), folder) == ["a.jsonl", "b.jsonl"]
    assert names(str(folder / "**" / "*.parquet"), folder) == ["deep/c.parquet"]


def test_a_list_keeps_its_order_and_gives_each_file_once(folder: Path) -> None:
    assert names([str(folder / "b.jsonl"), str(folder / "*.jsonl")], folder) == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "'missing.jsonl', which does not exist"),
        ("*.jsonl", r"'\*.jsonl', which holds no data files"),
        ("", "is empty"),
        ([], "is an empty list"),
        ("file:///x.jsonl", "write the path alone, '/x.jsonl'"),
        ("org/name", "does not exist .*: write hf://org/name"),
        ("https://host/x.jsonl", "'https://host/x.jsonl': expected a path"),
        ("example://icd9", "example://icd10"),
        ("s3://bucket/folder", "or a folder with / at the end"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(source, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"data.source.*{message}"):
        find_sources(source)


def test_a_folder_without_data_files_says_what_it_holds_instead(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"only 1 other files such as .*notes.txt"):
        find_sources(str(tmp_path))
    with pytest.raises(DataError, match=r"notes.txt': expected a name ending in .jsonl"):
        find_sources(str(tmp_path / "notes.txt"))


def test_an_s3_object_is_one_source_with_its_size(store: Store) -> None:
    store.put("incoming/a.jsonl", b"{}\n")
    store.put("incoming/a.jsonl.old", b"")
    (source,) = find_sources(store.uri("incoming/a.jsonl"))
    assert (source.name, source.size_bytes) == (store.uri("incoming/a.jsonl"), 3)


def test_an_s3_folder_gives_its_visible_data_files_sorted(store: Store) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.parquet", "notes.txt", "_temporary/x.jsonl"):
        store.put(f"incoming/{name}", b"{}\n")
    store.put("incoming-not/z.jsonl", b"{}\n")
    found = [each.name for each in find_sources(store.uri("incoming/"))]
    assert found == [store.uri(f"incoming/{name}") for name in ("a.jsonl", "b.jsonl", "deep/c.parquet")]


@pytest.mark.parametrize("key", ["incoming/a.jsonl", "incoming/"])
def test_an_s3_source_that_does_not_exist_is_named(store: Store, key: str) -> None:
    with pytest.raises(DataError, match=f"{store.uri(key)}', which (does not exist|holds no data files)"):
        find_sources(store.uri(key))


def test_a_link_that_leads_out_of_the_folder_is_refused_and_one_within_is_read(folder: Path) -> None:
    inner = folder / "deep"
    (inner / "within.jsonl").symlink_to(inner / "c.parquet")
    assert names(str(inner), folder) == ["deep/c.parquet", "deep/within.jsonl"]
    (inner / "out.jsonl").symlink_to("../a.jsonl")
    for source in (inner, inner / "*.jsonl", inner / "**" / "*.jsonl"):
        with pytest.raises(DataError, match=r"out\.jsonl is a link to .*/a\.jsonl: one must not lead out of .*/deep"):
            find_sources(str(source))
    assert names(str(inner / "out.jsonl"), folder) == ["deep/out.jsonl"]  # whoever names it means it
    assert "deep/out.jsonl" in names(str(folder), folder)  # from above it leads nowhere else


def test_folders_that_are_links_lead_on_nowhere(folder: Path) -> None:
    """Two links of a folder to itself are 2^40 ways through it, before the kernel stops following them."""
    for name in ("one", "two"):
        (folder / "deep" / name).symlink_to(".", target_is_directory=True)
    assert names(str(folder / "deep"), folder) == ["deep/c.parquet"]
    assert names(str(folder / "deep" / "**" / "*.parquet"), folder) == ["deep/c.parquet"]


def test_what_is_no_file_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "deep" / "pipe.jsonl")
    assert names(str(folder / "deep"), folder) == ["deep/c.parquet"]
    with pytest.raises(DataError, match=r"pipe\.jsonl', which is no file: expected a path"):
        find_sources(str(folder / "deep" / "pipe.jsonl"))


def test_a_glob_takes_hidden_files_only_where_it_says_so(folder: Path) -> None:
    (folder / ".hidden.jsonl").write_text("{}\n")
    assert names(str(folder / "**" / "*.jsonl"), folder) == ["a.jsonl", "b.jsonl"]
    assert names(str(folder / ".h*.jsonl"), folder) == [".hidden.jsonl"]
    with pytest.raises(DataError, match=r"which is no glob: "):
        find_sources(str(folder / "a**.jsonl"))


def test_other_formats_beside_jsonl_and_parquet_are_not_read_which_is_said(folder: Path, caplog) -> None:
    """They are a data set's own description more often than data."""
    for name in ("dataset_info.json", "stats.csv", "old.jsonl.gz"):
        (folder / name).write_text("{}")
    caplog.set_level("WARNING")
    assert names(str(folder), folder) == ["a.jsonl", "b.jsonl", "d.NDJSON", "deep/c.parquet"]
    assert "JSONL and Parquet are read, and 3 files beside them, such as dataset_info.json, not" in caplog.text
    assert names([str(folder / "*.csv"), str(folder / "old.jsonl.gz")], folder) == ["stats.csv", "old.jsonl.gz"]
    for path in folder.rglob("*"):
        if path.suffix in (".jsonl", ".parquet", ".NDJSON"):
            path.unlink()
    assert names(str(folder), folder) == ["dataset_info.json", "old.jsonl.gz", "stats.csv"]


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
def hub_folder(tmp_path: Path) -> Path:
    root = tmp_path / "served"
    for name, answer in {"main/train-0.jsonl": "m", "main/test-0.jsonl": "t", "socratic/train-0.jsonl": "s"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(ROW % answer)
    (root / "README.md").write_text("about")
    (root / "dataset_infos.json").write_text("{}")
    return root


def test_the_training_files_of_a_data_set_are_read_at_one_commit(ask: Ask, hub_folder: Path) -> None:
    with serving("org/name", hub_folder, "datasets") as served:
        globbed, named = "hf://datasets/org/name@v1/main/train-*.jsonl", "hf://org/name/main/test-0.jsonl"
        at = f"hf://datasets/org/name@{COMMIT}/main"
        train = [[f"{at}/train-0.jsonl"], ["m"]]
        found = ask("hf://org/name/main", globbed, named, endpoint=served.url)
        assert found == [train, train, [[f"{at}/test-0.jsonl"], ["t"]]]
        assert served.sent == {"main/train-0.jsonl", "main/test-0.jsonl"}


def test_a_data_set_that_cannot_be_read_is_named_with_the_reason(ask: Ask, hub_folder: Path) -> None:
    with serving("org/name", hub_folder, "datasets") as served:
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
