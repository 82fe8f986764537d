"""The store of the laptop's cluster, started here with the very arguments of its manifest."""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from components.config.schema import RegistryConfig
from components.shared.errors import StoreError
from components.store.store import Store
from infra.checks.manifests import of_kind, render
from infra.checks.pods import pods
from pipelines.local import guard
from pipelines.local.seaweedfs import SERVICES, Endpoint, find_binary
from pipelines.local.server import choose_ports
from tests.waiting import wait_until

HOST = "127.0.0.2"  # only a server that listens on every interface answers here, as in a pod
KEYS = ("laptop", "laptop-secret")


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """The ports of the running server, by service."""
    folder = tmp_path_factory.mktemp("s3")
    (pod,) = pods(list(of_kind(render("infra/overlays/kind"), "Deployment")))
    (container,) = pod.containers
    for volume in container["volumeMounts"]:
        (folder / volume["mountPath"].strip("/")).mkdir()
    command = [find_binary(), "mini", *(argument.replace("=/", f"={folder}/") for argument in container["args"])]
    flags = [f"{service}.port{suffix}" for suffix in ("", ".grpc") for service in SERVICES]
    chosen = dict(zip(flags, choose_ports(len(flags), earlier=[]), strict=True))
    command += [f"-{flag}={port}" for flag, port in chosen.items()]
    keys = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), KEYS, strict=True))
    kept = {"S3_BUCKET": "fineloop", "GOMEMLIMIT": "384MiB", "TMPDIR": str(folder / "tmp")}  # its /tmp, for its log
    environment = {**os.environ, **keys, **kept}
    with (folder / "log").open("wb") as log:
        process = guard.start(command, stdout=log.fileno(), environment=environment, directory=folder)
    try:
        yield {service: chosen[f"{service}.port"] for service in SERVICES}
    finally:
        guard.stop(process)
    assert {path.name for path in folder.iterdir()} <= {"data", "tmp", "log"}, "it writes where the root is read-only"


def status(port: int, path: str) -> int:
    """What a request without a key is answered with; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return 0


def opened(monkeypatch: pytest.MonkeyPatch, port: int, *keys: str) -> Store:
    for name, value in Endpoint(f"http://{HOST}:{port}", *keys, "fineloop").environment().items():
        monkeypatch.setenv(name, value)
    return Store.open(RegistryConfig(bucket="fineloop"))


def is_good(store: Store) -> bool:
    with contextlib.suppress(StoreError):
        store.check()
        return True
    return False


def test_no_port_gives_an_object_without_a_key(monkeypatch: pytest.MonkeyPatch, ports: dict[str, int]) -> None:
    store = opened(monkeypatch, ports["s3"], *KEYS)
    wait_until(lambda: is_good(store), "the registry cannot rely on it")
    store.put("secret", b"x")
    for path in ("/fineloop/secret", "/buckets/fineloop/secret"):
        assert not {status(port, path) for port in ports.values()} & {200, 206}


@pytest.mark.parametrize("keys", [("other", KEYS[1]), (KEYS[0], "other")])
def test_it_asks_for_its_own_key(monkeypatch: pytest.MonkeyPatch, ports: dict[str, int], keys: tuple[str, str]) -> None:
    wait_until(lambda: is_good(opened(monkeypatch, ports["s3"], *KEYS)))
    assert not is_good(opened(monkeypatch, ports["s3"], *keys))
