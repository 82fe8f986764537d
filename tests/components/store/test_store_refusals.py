"""Stores that cannot be used, and what they make a person read."""

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.shared.errors import Conflict, FineloopError, StoreError
from components.store import client
from components.store.store import Store, open_uri
from pipelines.cli import main
from pipelines.local.seaweedfs import Endpoint


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


def test_a_missing_bucket_names_the_field(s3_server: Endpoint, tmp_path: Path) -> None:
    store = Store.open(RegistryConfig(bucket="no-such-bucket"))
    uses = (store.check, lambda: store.read("x"), lambda: store.create("x", b""), lambda: list(store.list("")))
    for use in uses:
        with pytest.raises(StoreError, match=r"no bucket 'no-such-bucket' at http.* change registry\.bucket"):
            use()
    outside, key = open_uri("s3://no-such-bucket/data.jsonl", field="data.source")
    with pytest.raises(StoreError, match=r"change data\.source"):
        outside.get(key)
