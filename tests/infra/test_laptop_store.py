"""The store of the laptop's cluster, started here with the very arguments of its manifest."""

import contextlib
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from infra.checks.manifests import of_kind, render
from infra.checks.pods import pods
from pipelines.local import guard
from pipelines.local.ports import choose_ports
from pipelines.local.seaweedfs import SERVICES, find_binary
from tests.waiting import wait_until

HOST = "127.0.0.2"  # only a server that listens on every interface answers here, as in a pod
KEYS = {"AWS_ACCESS_KEY_ID": "laptop", "AWS_SECRET_ACCESS_KEY": "laptop-secret"}


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """The ports of the running server, by service."""
    folder = tmp_path_factory.mktemp("s3")
    (pod,) = pods(list(of_kind(render("infra/overlays/kind"), "Deployment")))
    container = pod.containers[0]
    assert container["command"] == ["weed", "mini"]
    for volume in container["volumeMounts"]:
        (folder / volume["mountPath"].strip("/")).mkdir()
    arguments = [argument.replace("=/", f"={folder}/") for argument in container["args"]]
    chosen = choose_ports(2 * len(SERVICES), earlier=[])
    named = dict(zip(SERVICES, chosen, strict=False))
    grpc = dict(zip(SERVICES, chosen[len(SERVICES) :], strict=True))
    arguments += [f"-{service}.port={port}" for service, port in named.items()]
    arguments += [f"-{service}.port.grpc={port}" for service, port in grpc.items()]
    environment = {**os.environ, **KEYS, "S3_BUCKET": "fineloop", "GOMEMLIMIT": "384MiB"}
    with (folder / "log").open("wb") as log:
        process = guard.start(
            [find_binary(), "mini", *arguments],
            orphan_signal=signal.SIGKILL,
            environment=environment,
            stdout=log.fileno(),
            directory=folder,
        )
    try:
        yield named
    finally:
        guard.stop(process)
    assert {path.name for path in folder.iterdir()} <= {"data", "tmp", "log"}, "it writes where the root is read-only"


@pytest.fixture(scope="module")
def s3(ports: dict[str, int]) -> Any:
    client = connect(ports["s3"], KEYS)

    def is_up() -> bool:
        with contextlib.suppress(EndpointConnectionError, ClientError):
            client.put_object(Bucket="fineloop", Key="up", Body=b"up")
            return True
        return False

    wait_until(is_up, "the store did not come up")
    return client


def connect(port: int, keys: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://{HOST}:{port}",
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, proxies={}),
    )


def test_it_refuses_what_the_registry_relies_on_being_refused(s3: Any) -> None:
    etag = s3.put_object(Bucket="fineloop", Key="alias", Body=b"1", IfNoneMatch="*")["ETag"]
    for stale in ({"IfNoneMatch": "*"}, {"IfMatch": '"0"'}):
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="fineloop", Key="alias", Body=b"2", **stale)
    s3.put_object(Bucket="fineloop", Key="alias", Body=b"3", IfMatch=etag)


@pytest.mark.parametrize("keys", [KEYS | {"AWS_ACCESS_KEY_ID": "other"}, KEYS | {"AWS_SECRET_ACCESS_KEY": "other"}])
def test_it_asks_for_its_own_key(s3: Any, ports: dict[str, int], keys: dict[str, str]) -> None:
    with pytest.raises(ClientError, match=r"403|InvalidAccessKeyId|SignatureDoesNotMatch"):
        connect(ports["s3"], keys).list_objects_v2(Bucket="fineloop")
    assert s3.list_objects_v2(Bucket="fineloop")["KeyCount"]


@pytest.mark.parametrize("service", ["s3", "master", "filer", "volume"])
def test_no_port_gives_an_object_without_a_key(s3: Any, ports: dict[str, int], service: str) -> None:
    s3.put_object(Bucket="fineloop", Key="secret", Body=b"x")
    for path in ("/fineloop/secret", "/buckets/fineloop/secret"):
        with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)):
            urllib.request.urlopen(f"http://{HOST}:{ports[service]}{path}", timeout=5).close()
