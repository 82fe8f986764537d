"""A base in a folder of S3: what a driver and what workers fetch of it, and that all read the same."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, IntegrityError
from components.store.store import ObjectInfo, Store
from ray_jobs.base import base_model
from ray_jobs.text import chat_format

pytestmark = pytest.mark.usefixtures("cache")


def resolve(reference: object) -> base_model.Base:
    return base_model.resolve(ModelConfig(base=str(reference)))


@pytest.fixture
def uploaded(store, tiny_base) -> str:
    for path in tiny_base.iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    return store.uri("bases/tiny/")


def test_an_s3_folder_is_downloaded_once_and_again_when_it_changes(uploaded, store):
    first = resolve(uploaded)
    inode = (first.path / "model.safetensors").stat().st_ino
    assert resolve(uploaded) == first
    assert (first.path / "model.safetensors").stat().st_ino == inode
    store.put("bases/tiny/generation_config.json", b'{"changed": true}')
    second = resolve(uploaded)
    assert second.path != first.path
    assert second.identity != first.identity


@pytest.fixture
def on_another_machine(uploaded, store, tmp_path, monkeypatch) -> Callable[..., tuple[base_model.Base, set[str]]]:
    """The base as it is brought onto a machine of that name, and the files that are fetched for it."""
    fetched: list[str] = []
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, key, path: fetched.append(path.name) or download(self, key, path)
    )

    def bring(name: str, **how: Any) -> tuple[base_model.Base, set[str]]:
        monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / name))
        fetched.clear()
        return base_model.resolve(ModelConfig(base=uploaded), registry=store, **how), set(fetched)

    return bring


def test_a_driver_never_fetches_the_weights_of_an_s3_folder(on_another_machine, uploaded, store, tiny_base):
    config, files = ModelConfig(base=uploaded), {path.name for path in tiny_base.iterdir()}
    unread, fetched = on_another_machine("driver", weights=False)
    assert fetched == files - {"model.safetensors"}
    assert not unread.is_known
    read, fetched = on_another_machine("worker", recorded=unread.identity)
    assert fetched == files
    assert read.identity == {**resolve(tiny_base).identity, "kind": "s3"}
    assert on_another_machine("worker", recorded=unread.identity) == (read, set())
    told, fetched = on_another_machine("driver of the next run", weights=False)
    assert (told.identity, told.is_known, fetched) == (read.identity, True, files - {"model.safetensors"})
    assert chat_format.load(unread, config).pad == chat_format.load(read, config).pad

    store.put("bases/tiny/model.safetensors", (read.path / "model.safetensors").read_bytes()[::-1])
    assert not on_another_machine("driver", weights=False)[0].is_known
    with pytest.raises(IntegrityError, match="have changed since the run began"):
        on_another_machine("worker of the first run", recorded=unread.identity)


def test_what_a_version_was_trained_on_is_taken_at_its_word_until_the_weights_are_read(on_another_machine):
    recorded = {"kind": "s3", "sha256": "0" * 64}
    base, fetched = on_another_machine("driver", weights=False, recorded=recorded)
    assert (base.identity, "model.safetensors" in fetched) == (recorded, False)
    with pytest.raises(IntegrityError, match="today that is kind s3 sha256"):
        on_another_machine("worker", recorded=base.identity)


def test_workers_that_read_other_bytes_of_the_same_objects_are_told_so(on_another_machine, uploaded, store):
    unread, _ = on_another_machine("driver", weights=False)
    on_another_machine("first", recorded=unread.identity)
    store.put_json(f"bases/s3-{unread.identity['listing']}/identity.json", {"kind": "s3", "sha256": "0" * 64})
    with pytest.raises(IntegrityError, match=rf"and had kind s3 sha256 {'0' * 64} where the same objects were read"):
        on_another_machine("second", recorded=unread.identity)


def test_new_bytes_of_the_same_size_and_second_are_another_base(uploaded, store, monkeypatch):
    listing, second = Store.list, datetime(2026, 11, 29, tzinfo=UTC)
    monkeypatch.setattr(
        Store, "list", lambda self, prefix: (replace(info, last_modified=second) for info in listing(self, prefix))
    )
    first = resolve(uploaded)
    store.put("bases/tiny/model.safetensors", (first.path / "model.safetensors").read_bytes()[::-1])
    assert resolve(uploaded).identity != first.identity


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
