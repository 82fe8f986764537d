"""The embedded S3 server of one home, shared by everything that runs on it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import GroundError
from pipelines.local import seaweedfs
from pipelines.local.service import Service


def service(home: Path) -> Service:
    """The shared server of `home`."""
    return Service("store", "the local S3 server", home.absolute(), start_timeout_s=100.0)


def configured() -> bool:
    """Whether the environment names a store already; it wins over the embedded one."""
    return bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))


@contextlib.contextmanager
def using_store(home: Path, bucket: str) -> Iterator["StoreInUse"]:
    """Use the embedded store; it starts when it is not up, and stays while anybody uses it.

    Raises:
        GroundError: it did not start.
    """
    with service(home).use(arguments=["--bucket", bucket], environment=os.environ) as endpoint:
        yield StoreInUse(service(home), endpoint, bucket)


@dataclass(frozen=True)
class StoreInUse:
    """The embedded store while this process uses it. Its address is settled; it may not answer yet."""

    service: Service
    endpoint: dict[str, Any]
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """What an S3 client needs."""
        return _environment(self.endpoint)

    def wait_ready(self) -> dict[str, str]:
        """Wait until it answers and the bucket is there; the environment then, which may differ from the first."""
        endpoint = self.service.wait_ready()
        if endpoint["bucket"] != self.bucket:
            seaweedfs.create_bucket(endpoint["url"], endpoint["access_key"], endpoint["secret_key"], self.bucket)
        return _environment(endpoint)


def store_up(home: Path, bucket: str) -> dict[str, str]:
    """Start the embedded store and let it stay until `store_down`. Returns what an S3 client needs.

    Raises:
        GroundError: it did not start.
    """
    with using_store(home, bucket) as store:
        environment = store.wait_ready()
        store.service.pin()
    return environment


def store_down(home: Path) -> bool:
    """Stop the embedded store; False when it was not up.

    Raises:
        GroundError: somebody uses it.
    """
    hint = "end that run, or the local Ray head with `fineloop ray down`"
    return service(home).down(stop_with=hint)


def store_environment(home: Path) -> dict[str, str]:
    """What an S3 client needs to use the embedded store that is up now. Starts nothing.

    Raises:
        GroundError: none is up.
    """
    endpoint = service(home).endpoint()
    if endpoint is None:
        raise GroundError(f"no local S3 server is up under {home}: start one with `fineloop store up`")
    return _environment(endpoint)


def start(
    directory: Path, bucket: str, announce: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], "RunningStore"]:
    """Start the server: what the keeper runs."""
    endpoint = seaweedfs.start(directory, bucket, announce=lambda settled: announce(_record(settled)))
    return _record(endpoint), RunningStore(endpoint)


@dataclass(frozen=True)
class RunningStore:
    """The server, in its keeper's hands."""

    endpoint: seaweedfs.Endpoint

    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.endpoint.process.poll() is not None

    def stop(self) -> None:
        """Stop it and wait until it is gone."""
        seaweedfs.stop(self.endpoint)


def _record(endpoint: seaweedfs.Endpoint) -> dict[str, Any]:
    return {
        "url": endpoint.url,
        "access_key": endpoint.access_key,
        "secret_key": endpoint.secret_key,
        "bucket": endpoint.bucket,
    }


def _environment(endpoint: dict[str, Any]) -> dict[str, str]:
    environment = seaweedfs.client_environment(endpoint["url"], endpoint["access_key"], endpoint["secret_key"])
    if "AWS_SESSION_TOKEN" in os.environ:  # of another store: it would be sent along with these keys
        environment["AWS_SESSION_TOKEN"] = ""
    return environment
