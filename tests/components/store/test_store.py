import hashlib
import io
import logging
import random
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.config.schema import RegistryConfig
from components.registry import signing
from components.shared.errors import (
    ConfigError,
    Conflict,
    FineloopError,
    IntegrityError,
    ObjectMissing,
    StoreError,
    UserError,
)
from components.store import client
from components.store.client import PART_BYTES, client_from_environment
from components.store.store import ObjectFile, ReadOnce, Store, open_uri
from pipelines.cli import main
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


class Lenient(BaseHTTPRequestHandler):
    """An S3 of one bucket with faults to choose. botocore signs If-Match, so that no proxy could strip it."""

    protocol_version = "HTTP/1.1"  # answers `Expect: 100-continue`, for which botocore would wait a second
    objects: dict[str, bytes]
    ignores: set[str]
    unanswered: list[str]
    """Methods whose next request is carried out but answered with a server error."""
    busy: list[str]
    """Methods whose next request is refused with 503."""
    broken: list[str]
    """Keys whose next body breaks off half-way."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "PUT" in self.busy:
            self.busy.remove("PUT")
            return self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = body.split(b"\r\n")[1]
        present = self.objects.get(self.path)
        fails = {
            "If-None-Match": "If-None-Match" in self.headers and present is not None,
            "If-Match": "If-Match" in self.headers and (present is None or self.headers["If-Match"] != etag(present)),
        }
        if any(failed and header not in self.ignores for header, failed in fails.items()):
            return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.objects[self.path] = body
        if "PUT" in self.unanswered:
            self.unanswered.remove("PUT")
            return self._answer(500, b"<Error><Code>InternalError</Code></Error>")
        return self._answer(200, b"", etag(body))

    def do_GET(self) -> None:
        if "list-type" in self.path:
            return self._answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        body = self.objects.get(self.path)
        if body is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if self.path in self.broken:
            self.broken.remove(self.path)
            self.send_response(200)
            self.send_header("ETag", etag(body))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1])
            self.close_connection = True
            return None
        return self._answer(200, body, etag(body))

    def do_POST(self) -> None:
        keys = re.findall(rb"<Key>(.*?)</Key>", self.rfile.read(int(self.headers["Content-Length"])))
        for key in keys:
            self.objects.pop(f"/bucket/{key.decode()}", None)
        self._answer(200, b"<DeleteResult/>")

    def _answer(self, status: int, body: bytes, tag: str = "") -> None:
        self.send_response(status)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Lenient]]:
    """The faults of a server that the environment points at."""
    handler = type("Handler", (Lenient,), {"objects": {}, "ignores": set(), "unanswered": [], "busy": [], "broken": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_store_that_ignores_a_condition_is_refused(lenient: type[Lenient], header: str) -> None:
    store = Store.open(RegistryConfig(bucket="bucket"))
    store.check()
    lenient.ignores.add(header)
    with pytest.raises(StoreError, match=rf"does not honour {header} .*set AWS_ENDPOINT_URL"):
        store.check()
    assert lenient.objects == {}


@pytest.mark.parametrize(("verb", "named"), [("promote", "icd@v1"), ("approve", "icd@v1"), ("rollback", "icd")])
def test_no_alias_moves_by_hand_in_a_store_that_ignores_a_condition(
    lenient: type[Lenient], capsys: pytest.CaptureFixture[str], verb: str, named: str
) -> None:
    lenient.ignores.add("If-Match")
    assert main(["adapters", verb, named, "--by", "ada", "--reason", "so"]) == 1
    assert "does not honour If-Match" in capsys.readouterr().err
    assert not any("/adapters/" in key for key in lenient.objects)


def test_a_write_whose_answer_was_lost_is_not_taken_for_a_conflict(lenient: type[Lenient]) -> None:
    store = Store.open(RegistryConfig(bucket="bucket"))
    lenient.unanswered.append("PUT")
    before = store.create("key", b"mine")
    assert before == etag(b"mine")
    lenient.unanswered.append("PUT")
    assert store.swap("key", b"after", before) == etag(b"after")
    lenient.objects["/bucket/other"] = b"theirs"
    with pytest.raises(Conflict):
        store.create("other", b"mine")


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    monkeypatch.setattr("components.store.client.BUSY_PAUSE_S", 0.001)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.usefixtures("_no_pause")
def test_a_store_that_is_busy_for_a_while_is_waited_for(lenient: type[Lenient]) -> None:
    store = Store.open(RegistryConfig(bucket="bucket"))
    lenient.busy.extend(["PUT"] * (client.ATTEMPTS_WHERE_BUSY - 1))
    assert store.create("key", b"mine") == etag(b"mine")
    lenient.busy.extend(["PUT"] * client.ATTEMPTS_WHERE_BUSY)
    with pytest.raises(StoreError, match="failed on s3://bucket/other with SlowDown"):
        store.create("other", b"mine")
    assert lenient.busy == []


def test_a_body_that_breaks_off_is_asked_for_again(lenient: type[Lenient]) -> None:
    store = Store.open(RegistryConfig(bucket="bucket"))
    lenient.objects["/bucket/key"] = b"whole"
    lenient.broken.append("/bucket/key")
    assert store.get("key") == b"whole"


def test_a_store_that_does_not_answer_is_no_full_disk(
    s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("components.store.client.READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr("components.store.client.ATTEMPTS", 1)
    (tmp_path / "file").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = Store.open(RegistryConfig(bucket=s3_server.bucket))
        for use in (
            lambda: store.put("x", b""),
            lambda: store.create("x", b""),
            lambda: store.put("x", tmp_path / "file"),
            lambda: store.read("x"),
            lambda: list(store.list("")),
        ):
            with pytest.raises(StoreError, match=r"did not answer for 0\.1 s about s3://.*overloaded"):
                use()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_name_the_variables_and_no_value(
    s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "not-the-right-one")
    store = Store.open(RegistryConfig(bucket=s3_server.bucket))
    for use in (store.check, lambda: store.read("x"), lambda: store.put("x", b""), lambda: store.exists("x")):
        with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as raised:
            use()
        assert s3_server.access_key not in str(raised.value)
        assert s3_server.secret_key not in str(raised.value)
        assert "not-the-right-one" not in str(raised.value)


def test_absent_credentials_name_the_variables(
    s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store.open(RegistryConfig(bucket=s3_server.bucket)).check()


def test_an_unreachable_endpoint_is_named_with_its_variable(
    s3_server: Endpoint, free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{free_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    store = Store.open(RegistryConfig(bucket=s3_server.bucket))
    path = tmp_path / "file"
    with pytest.raises(FineloopError, match=str(path)):
        store.put("x", path)  # there is no such file
    path.write_bytes(b"x")
    for use in (store.check, lambda: store.put("x", path), lambda: store.download("x", path)):
        with pytest.raises(StoreError, match=f"{endpoint} cannot be reached .*AWS_ENDPOINT_URL"):
            use()


@pytest.mark.usefixtures("_no_pause")
def test_in_a_pod_a_store_that_cannot_be_reached_yet_is_waited_for(
    s3_server: Endpoint, free_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The ways of a new pod open after its start, as on a node where kube-router was a minute behind."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    store = Store.open(RegistryConfig(bucket=s3_server.bucket))
    tried = []
    store._client.meta.events.register("before-send.s3", lambda **_: tried.append(1))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StoreError, match="cannot be reached"):
        store.get("x")
    assert len(tried) == client.ATTEMPTS
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with pytest.raises(StoreError, match="cannot be reached"):
        store.get("x")
    assert len(tried) == client.ATTEMPTS + client.ATTEMPTS_WHERE_BUSY
    assert len(caplog.messages) == 1


def test_an_endpoint_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost 9000")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL is 'localhost 9000'"):
        Store.open(RegistryConfig())


PLATFORMS, NEW, EVALUATING, OWN = (
    signing.public_text(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))) for number in range(4)
)


def test_where_a_deployment_fixes_keys_a_config_without_them_or_with_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINELOOP_TRUSTED_KEYS", f"{PLATFORMS} {NEW}")
    monkeypatch.setenv("FINELOOP_TRUSTED_EVALUATION_KEYS", EVALUATING)
    for keys in ([], [OWN], [PLATFORMS, OWN]):
        with pytest.raises(ConfigError, match=r"registry\.trusted_keys is .* takes no other keys than those in"):
            Store.open(RegistryConfig(trusted_keys=keys))
    for keys in ([], [OWN]):
        with pytest.raises(ConfigError, match=r"registry\.evaluation_keys is"):
            Store.open(RegistryConfig(trusted_keys=[PLATFORMS], evaluation_keys=keys))
    store = Store.open(RegistryConfig(trusted_keys=[PLATFORMS], evaluation_keys=[EVALUATING]))
    assert [*store.trusted_keys] == [PLATFORMS, NEW]  # what the other one revoked is revoked
    assert [*store.evaluation_keys] == [EVALUATING]


def test_a_missing_bucket_names_the_field(s3_server: Endpoint, tmp_path: Path) -> None:
    store = Store.open(RegistryConfig(bucket="no-such-bucket"))
    uses = (store.check, lambda: store.read("x"), lambda: store.create("x", b""), lambda: list(store.list("")))
    for use in uses:
        with pytest.raises(StoreError, match=r"no bucket 'no-such-bucket' at http.* change registry\.bucket"):
            use()
    outside, key = open_uri("s3://no-such-bucket/data.jsonl", field="data.source")
    with pytest.raises(StoreError, match=r"change data\.source"):
        outside.get(key)
