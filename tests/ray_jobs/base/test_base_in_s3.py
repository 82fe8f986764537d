"""A base in a folder of S3: brought here once, known by its bytes, and known again without them."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, IntegrityError
from components.store.store import ObjectInfo, Store
from ray_jobs.base import base_model
from ray_jobs.text import chat_format


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def uploaded(store, tiny_base) -> str:
    for path in tiny_base.iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    return store.uri("bases/tiny")


def resolve(reference: object) -> base_model.Base:
    return base_model.resolve(ModelConfig(base=str(reference)))


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_s3_folder_is_the_same_base_as_its_files_on_disk(slash, uploaded, tiny_base):
    base = resolve(uploaded + slash)
    assert base.identity == {**resolve(tiny_base).identity, "kind": "s3"}
    assert {path.name: path.read_bytes() for path in base.path.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_base.iterdir()
    }


def test_an_s3_folder_is_downloaded_once_and_again_when_it_changes(uploaded, store):
    first = resolve(uploaded)
    inode = (first.path / "model.safetensors").stat().st_ino
    assert resolve(uploaded) == first
    assert (first.path / "model.safetensors").stat().st_ino == inode
    store.put("bases/tiny/generation_config.json", b'{"changed": true}')
    second = resolve(uploaded)
    assert second.path != first.path
    assert second.identity != first.identity


def test_a_driver_fetches_the_weights_of_an_s3_folder_only_where_nobody_has_read_them(
    uploaded, store, tmp_path, monkeypatch
):
    config, fetched = ModelConfig(base=uploaded), []
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, key, path: fetched.append(path.name) or download(self, key, path)
    )

    def on_another_machine(name: str) -> base_model.Base:
        monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / name))
        fetched.clear()
        return base_model.resolve(config, weights=False, registry=store)

    first = on_another_machine("first")
    assert "model.safetensors" in fetched
    base = on_another_machine("second")
    assert set(fetched) == {path.name for path in first.path.iterdir()} - {"model.safetensors"}
    assert base.identity == first.identity == resolve(uploaded).identity
    assert chat_format.load(base, config).pad == chat_format.load(first, config).pad

    store.put("bases/tiny/model.safetensors", (first.path / "model.safetensors").read_bytes()[::-1])
    assert on_another_machine("third").identity != first.identity
    assert "model.safetensors" in fetched


def test_new_bytes_of_the_same_size_and_second_are_another_base(uploaded, store, monkeypatch):
    listing, second = Store.list, datetime(2026, 11, 29, tzinfo=UTC)
    monkeypatch.setattr(
        Store, "list", lambda self, prefix: (replace(info, last_modified=second) for info in listing(self, prefix))
    )
    first = resolve(uploaded)
    store.put("bases/tiny/model.safetensors", (first.path / "model.safetensors").read_bytes()[::-1])
    assert resolve(uploaded).identity != first.identity


def test_a_worker_refuses_a_base_in_s3_that_is_not_the_remembered_one(uploaded, store, cache, monkeypatch, tmp_path):
    config = ModelConfig(base=uploaded)
    first = base_model.resolve(config, weights=False, registry=store)
    store.put_json(f"bases/{first.path.name}/identity.json", {"kind": "s3", "sha256": "0" * 64})
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "another machine"))
    said = base_model.resolve(config, weights=False, registry=store).identity
    with pytest.raises(IntegrityError, match="today that is kind s3 sha256"):
        base_model.resolve(config, recorded=said)


def test_a_folder_beside_it_with_a_longer_name_is_not_part_of_it(uploaded, store):
    store.put("bases/tiny-other/stray.txt", b"x")
    assert not (resolve(uploaded).path / "stray.txt").exists()


@pytest.mark.parametrize("name", ["../x.json", "/x.json"])
def test_an_s3_folder_whose_objects_would_lie_elsewhere_is_refused(name, store, cache, monkeypatch):
    """Servers that keep such keys as they are exist; ours here makes paths of them."""

    def listed(_, prefix):
        return iter([ObjectInfo(key=f"{prefix}{name}", size=1, etag="0", last_modified=datetime.now(UTC))])

    monkeypatch.setattr(Store, "list", listed)
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ConfigError, match=rf"the object '.*/bases/odd/{name}' would leave the folder: rename it"):
        resolve(store.uri("bases/odd"))


def test_an_empty_s3_folder_says_so_and_leaves_nothing_in_the_cache(store, cache):
    with pytest.raises(ConfigError, match="there is nothing in this folder"):
        resolve(store.uri("bases/none"))
    assert not cache.exists()


def test_an_s3_folder_that_is_no_model_is_refused(store):
    store.put("bases/odd/weights.bin", b"x")
    with pytest.raises(ConfigError, match=r"bases/odd: no config\.json there"):
        resolve(store.uri("bases/odd"))


# pkg:// weights
