"""`fineloop push`, to a hub on loopback."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from components.registry.versions import publish_version
from components.store.store import Store
from tests.doubles import writable_hub
from tests.doubles.writable_hub import READER, WRITER, WritableHub

# huggingface_hub 2.4 hands httpx raw bytes by an old name: lfs.py.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Push = Callable[..., dict[str, Any]]
CARD = "---\nbase_model: acme/base\n---\n\n# sums\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub.running() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield running


@pytest.fixture
def push(answer: Push) -> Push:
    return partial(answer, "push")


def version_of(store: Store, base: str = "acme/base", **more: bytes) -> str:
    files = {
        "adapter_model.safetensors": b"weights of " + base.encode(),
        "adapter_config.json": json.dumps({"base_model_name_or_path": base}).encode(),
        "README.md": CARD.encode(),
    }
    return publish_version(store, "sums", {**files, **more}, lineage={}).version


def test_a_version_goes_to_a_private_repository_under_a_tag_of_its_own(store, hub, push):
    version = version_of(store)
    answer = push(f"sums@{version}", "acme/sums")
    there = hub.repositories["acme/sums"]
    assert there.private
    assert there.files["adapter_model.safetensors"] == b"weights of acme/base"
    adapter = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert set(there.files) == {*adapter, "lineage.json", "manifest.json"}
    assert there.tags == {version: there.commits[-1]}
    assert answer == {
        **{"name": "sums", "version": version, "repository": "acme/sums", "tag": version},
        "url": f"{hub.url}/acme/sums/commit/{there.commits[-1]}",
    }
    assert "has v" in push(f"sums@{version}", "acme/sums", exit_code=2)["error"]["message"]
    assert len(there.commits) == 1
    another = version_of(store, "acme/other")
    push(f"sums@{another}", "acme/sums")
    assert set(there.tags) == {version, another}


def test_nothing_goes_to_a_public_repository_unless_that_is_said(store: Store, hub: WritableHub, push: Push) -> None:
    hub.repositories["acme/sums"] = writable_hub.Repository(private=False)
    version = version_of(store)
    assert "acme/sums is public" in push(f"sums@{version}", "acme/sums", exit_code=2)["error"]["message"]
    assert hub.repositories["acme/sums"].files == {}
    push(f"sums@{version}", "acme/sums", "--public")
    assert hub.repositories["acme/sums"].files


def test_a_base_goes_from_the_folder_that_pull_wrote_and_the_adapter_then_names_it(store, hub, push, tmp_path):
    version = version_of(store, "pkg://p/f.gguf")
    folder = tmp_path / "sums-base"
    folder.mkdir()
    (folder / "export.json").write_text(json.dumps({"form": "base", "version": version}))
    for name in ("model.safetensors", "LICENSE"):
        (folder / name).write_bytes(b"of the base")
    assert push(f"sums@{version}", "acme/p", "--from", str(folder))["tag"] == f"{version}-base"
    assert set(hub.repositories["acme/p"].files) == {"model.safetensors", "LICENSE", "export.json"}
    assert "and name it with --base" in push(f"sums@{version}", "acme/sums", exit_code=2)["error"]["message"]
    push(f"sums@{version}", "acme/sums", "--base", "acme/p")
    files = hub.repositories["acme/sums"].files
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "acme/p"}
    assert b"base_model: acme/p\n" in files["README.md"]
    assert "manifest.json" not in files


def test_what_an_export_wrote_goes_in_place_of_the_version(store, hub, push, tmp_path):
    version = version_of(store)
    folder = tmp_path / "merged"
    folder.mkdir()
    message = push(f"sums@{version}", "acme/sums", "--from", str(folder), exit_code=2)["error"]["message"]
    assert "has no export.json" in message
    (folder / "export.json").write_text(json.dumps({"version": version, "form": "merged"}))
    (folder / "model.safetensors").write_bytes(b"merged")
    assert push(f"sums@{version}", "acme/sums", "--from", str(folder))["tag"] == f"{version}-merged"
    assert hub.repositories["acme/sums"].files["model.safetensors"] == b"merged"
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    message = push(f"sums@{version}", "acme/sums", "--from", str(folder), exit_code=2)["error"]["message"]
    assert "holds pytorch_model.bin: weights go as safetensors alone" in message


@pytest.mark.parametrize(
    ("token", "base", "repository", "message"),
    [
        ("", "acme/base", "acme/sums", "HF_TOKEN is not set"),
        (READER, "acme/base", "acme/sums", "HF_TOKEN must be a token that may write"),
        ("hf_wrong", "acme/base", "acme/sums", "refuses acme/sums (401)"),
        (WRITER, "/home/me/base", "acme/sums", "was trained on /home/me/base, which nobody else can load"),
        (WRITER, "acme/base", "sums", "'sums' is no repository: expected ORG/NAME"),
    ],
)
def test_what_the_hub_would_refuse_is_said(store, hub, push, monkeypatch, token, base, repository, message):
    monkeypatch.setenv("HF_TOKEN", token)
    version = version_of(store, base)
    assert message in push(f"sums@{version}", repository, exit_code=2)["error"]["message"]
    assert not any(each.files for each in hub.repositories.values())


def test_a_card_that_the_hub_does_not_take_ends_the_push_before_any_upload(store, hub, push):
    version = version_of(store, **{"README.md": CARD.replace("acme/base", "./base").encode()})
    message = push(f"sums@{version}", "acme/sums", exit_code=2)["error"]["message"]
    assert "the hub does not take README.md: Invalid metadata" in message
    assert hub.uploaded == {}


def test_without_a_hub_the_push_says_so(store: Store, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    version = version_of(store)
    answer = push(f"sums@{version}", "acme/sums", exit_code=1)
    assert "the hub at http://127.0.0.1:9 cannot be reached" in answer["error"]["message"]
