"""`fineloop adapters export` as a process, on a real store and a real version of the tiny base."""

import json
from pathlib import Path

import pytest

from components.registry.versions import Version
from components.store.store import Store
from tests.pipelines.command_line import body, colours, fineloop

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Version:
    return colours(store, tmp_path, "vera")


@pytest.mark.slow
def test_a_version_is_exported_where_told_and_never_over_something(published: Version, tmp_path: Path) -> None:
    arguments = ("adapters", "export", "colours", "-c", "where.toml", "--merged", "--to", "out/merged")
    done = fineloop(*arguments, "--dtype", "float32", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = body(done)
    assert found["path"] == str(tmp_path / "out" / "merged")
    assert (found["version"], found["form"], found["dtype"]) == (published.version, "merged", "float32")
    assert found["parity"]["merge"]["argmax_agreement"] >= 0.999
    assert json.loads((tmp_path / "out" / "merged" / "export.json").read_text())["version"] == published.version
    assert "held-out records" in done.stderr
    assert "merging into" in done.stderr
    assert "[export]" not in done.stderr

    again = fineloop(*arguments, "--json", cwd=tmp_path)
    assert again.returncode == 2
    assert body(again)["error"]["kind"] == "UserError"
    assert "is not empty" in body(again)["error"]["message"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_a_version_is_pulled_with_its_base_as_a_folder_once(store: Store, tmp_path: Path) -> None:
    version = colours(store, tmp_path, "lora")
    pull = ("adapters", "pull", "colours", "-c", "where.toml", "--to", "here", "--with-base", "--json")
    found = body(fineloop(*pull, cwd=tmp_path))
    base = tmp_path / "here-base"
    assert (found["version"], found["base_path"]) == (version.version, str(base))
    written = (base / "model.safetensors").stat()
    assert (base / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert body(fineloop(*pull, cwd=tmp_path)) == found
    again = (base / "model.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    (base / "export.json").unlink()
    assert "is not empty" in fineloop(*pull, cwd=tmp_path).stderr


@pytest.mark.slow
@pytest.mark.usefixtures("published")
def test_a_gguf_without_a_converter_is_a_mistake_in_the_input(tmp_path: Path) -> None:
    what = ("adapters", "export", "colours", "--gguf", "--converter", "llama.cpp/convert_hf_to_gguf.py", "--json")
    done = fineloop(*what, "-c", "where.toml", cwd=tmp_path)
    assert (done.returncode, body(done)["error"]["kind"]) == (2, "UserError")
    assert "there is no such file" in body(done)["error"]["message"]
