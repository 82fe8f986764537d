import hashlib
import io
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.shared.errors import Conflict, IntegrityError, ObjectMissing, UserError
from components.store import client
from components.store.client import PART_BYTES, client_from_environment
from components.store.store import ObjectFile, ReadOnce, Store, open_uri
from pipelines.local.seaweedfs import Endpoint


def test_an_absent_object_is_missing(store: Store, tmp_path: Path) -> None:
    assert store.read("nothing") is None
    with pytest.raises(ObjectMissing, match=f"s3://{store.bucket}/{store.prefix}/nothing does not exist"):
        store.get("nothing")
    with pytest.raises(ObjectMissing):
        list(store.chunks("nothing"))
    with pytest.raises(ObjectMissing):
        store.download("nothing", tmp_path / "file")
    with pytest.raises(ObjectMissing):
        ObjectFile(store, "nothing", 10).read()
    store.delete(["nothing"])
    store.delete([])
    assert list(tmp_path.iterdir()) == []


def test_json_is_read_back_and_damage_is_named(store: Store) -> None:
    store.put_json("a.json", {"b": [1, None], "a": "ü"})
    assert store.get("a.json") == '{"a":"ü","b":[1,null]}'.encode()
    assert store.get_json("a.json") == {"a": "ü", "b": [1, None]}
    store.put("a.json", b"{")
    with pytest.raises(IntegrityError, match=r"a\.json is not JSON"):
        store.get_json("a.json")


def test_a_large_file_travels_in_parts_and_comes_back_whole(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "large"
    block = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256)) * 128  # 1 MiB
    with path.open("wb") as file:
        for _ in range(70):
            file.write(block)
        file.write(b"end")
    assert path.stat().st_size > 2 * PART_BYTES
    store.put("large", path)
    found = store.read("large")
    assert found is not None
    assert "-" in found[1]  # the etag of an object that was uploaded in parts
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert b"".join(store.chunks("large")) == path.read_bytes()


def test_create_writes_once(store: Store) -> None:
    etag = store.create("one", b"first")
    with pytest.raises(Conflict, match="one was created or changed by another writer"):
        store.create("one", b"second")
    assert store.read("one") == (b"first", etag)


def test_swap_refuses_a_stale_etag_and_a_deleted_object(store: Store) -> None:
    first = store.create("pointer", b"1")
    second = store.swap("pointer", b"2", first)
    with pytest.raises(Conflict):
        store.swap("pointer", b"3", first)
    assert store.read("pointer") == (b"2", second)
    store.delete(["pointer"])
    with pytest.raises(Conflict):
        store.swap("pointer", b"3", second)
    assert not store.exists("pointer")


def test_concurrent_increments_by_compare_and_swap_lose_none(store: Store) -> None:
    store.create("counter", b"0")

    def increment(writer: int) -> None:
        done = 0
        while done < 25:
            found = store.read("counter")
            assert found is not None
            value = int(found[0].split()[0]) + 1
            try:
                store.swap("counter", f"{value} by {writer}".encode(), found[1])
            except Conflict:
                continue
            done += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increment, range(8)))
    assert int(store.get("counter").split()[0]) == 200


@pytest.mark.slow
def test_a_listing_of_more_than_a_page_is_whole_and_deletes_whole(store: Store) -> None:
    names = [f"many/{number:04}" for number in range(1050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b"x"), names))
    store.put("manyfold", b"not in the folder")
    listed = list(store.list("many/"))
    assert [info.key for info in listed] == names
    assert {info.size for info in listed} == {1}
    assert listed[0].last_modified.tzinfo is not None
    store.delete(name for name in names)
    assert [info.key for info in store.list("")] == ["manyfold"]


def test_folders_are_those_directly_below(store: Store) -> None:
    for key in ("adapters/a/x", "adapters/a/y/z", "adapters/b/x", "adapters/file", "other/c/", "other/c/x"):
        store.put(key, b"")
    assert list(store.folders("adapters/")) == ["a", "b"]
    assert list(store.folders("")) == ["adapters", "other"]
    assert list(store.folders("nothing/")) == []
    assert [info.key for info in store.list("other/c/")] == ["other/c/x"]  # and not the folder's marker


@pytest.mark.parametrize("prefix", ["", "team/registry"])
def test_uris_and_keys_are_inverses(s3_server: Endpoint, prefix: str) -> None:
    store = Store.open(RegistryConfig(bucket=s3_server.bucket, prefix=prefix))
    uri = store.uri("adapters/x/versions/v1")
    assert uri == f"s3://{s3_server.bucket}/{prefix + '/' if prefix else ''}adapters/x/versions/v1"
    assert store.key(uri) == "adapters/x/versions/v1"


OUTSIDE = "s3://elsewhere/team/a s3://fineloop-tests/team-b/a s3://fineloop-tests/team https://x/y s3:// /team/a"


@pytest.mark.parametrize("uri", OUTSIDE.split())
def test_an_address_outside_the_registry_has_no_key(s3_server: Endpoint, uri: str) -> None:
    store = Store.open(RegistryConfig(bucket=s3_server.bucket, prefix="team"))
    with pytest.raises(UserError):
        store.key(uri)


def test_input_data_is_read_by_its_address(store: Store) -> None:
    store.put("in/data.jsonl", b"{}\n")
    outside, key = open_uri(store.uri("in/data.jsonl"))
    assert outside.get(key) == b"{}\n"
    with pytest.raises(UserError, match="write s3://BUCKET/KEY"):
        open_uri("data.jsonl")


def test_requests_and_bytes_of_bodies_are_counted(store: Store, tmp_path: Path) -> None:
    before = client.so_far()
    (tmp_path / "body").write_bytes(bytes(1000))
    store.put("counted", bytes(100))
    store.put("counted-file", tmp_path / "body")
    store.get("counted")
    store.exists("counted")
    after = client.so_far()
    assert after.requests - before.requests == 4
    assert after.written_bytes - before.written_bytes == 1100
    assert after.read_bytes - before.read_bytes == 100


def test_where_credentials_were_found_stands_in_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """kfp's executor logs all from INFO on, and each store of a step would say it again."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(logging.getLogger("botocore"), "level", logging.NOTSET)
    with caplog.at_level(logging.INFO):
        client_from_environment()
    assert [record for record in caplog.records if record.name.startswith("botocore")] == []


def test_an_object_and_a_listing_are_read_once(store: Store) -> None:
    sent: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method) or None)
    for key in ("a/1", "a/b/2", "a-c/3"):
        store.put(key, key.encode())
    once = ReadOnce(store)
    sent.clear()
    for _ in range(2):
        assert once.get("a-c/3") == b"a-c/3"
        assert once.read("a-c/4") is None
        assert [info.key for info in once.list("a/")] == ["a/1", "a/b/2"]
        assert [info.key for info in once.list("a/b/")] == ["a/b/2"]
        assert once.read("a/b/3") is None
    assert len(sent) == 3


def test_what_is_written_meanwhile_is_not_seen(store: Store) -> None:
    once = ReadOnce(store)
    store.put("a/1", b"1")
    assert [info.key for info in once.list("a/")] == ["a/1"]
    assert once.get("a/1") == b"1"
    store.put("a/1", b"2")
    store.put("a/2", b"2")
    assert (once.get("a/1"), once.read("a/2")) == (b"1", None)


def test_an_object_reads_like_the_file_that_holds_the_same_bytes(store: Store) -> None:
    body, choose = random.Random(0).randbytes(10_000), random.Random(1)
    store.put("x", body)
    judge, found = io.BytesIO(body), ObjectFile(store, "x", len(body))
    for _ in range(60):
        if choose.random() < 0.5:
            place, whence = choose.choice([(choose.randrange(12_000), 0), (-choose.randrange(9_000), 2)])
            assert found.seek(place, whence) == judge.seek(place, whence)
        size = choose.choice([0, 1, 100, 5_000, 20_000, -1, None])
        assert found.read(size) == judge.read(size)
        assert found.tell() == judge.tell()
