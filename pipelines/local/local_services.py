"""The S3 server and the Ray head of one home, shared by everything that runs on it.

The environment takes precedence: with AWS_ENDPOINT_URL no store is started, with RAY_ADDRESS no Ray head.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.shared.errors import FineloopError, GroundError, UserError
from pipelines.local import ray_head, seaweedfs
from pipelines.local.ray_head import RayHead
from pipelines.local.seaweedfs import Endpoint, SeaweedFS
from pipelines.local.server import ATTEMPTS, Service, private_folder

FULL_BYTES, FULL_SHARE = 64e6, 0.01
"""Free disk space, in bytes and as a share, below which SeaweedFS stops to write (its `minFreeSpacePercent`), or soon
will."""
MARGIN_S = 30.0  # extra time for a keeper, beyond its server's attempts to start


def store_service(home: Path) -> Service:
    """Return the shared S3 server of `home`."""
    return Service("store", SeaweedFS.title, home.absolute(), ATTEMPTS * SeaweedFS.start_timeout_s + MARGIN_S)


def ray_service(home: Path) -> Service:
    """Return the shared Ray head of `home`."""
    return Service("ray", RayHead.title, home.absolute(), ATTEMPTS * RayHead.start_timeout_s + MARGIN_S)


def store_configured() -> bool:
    """Whether the environment names a store."""
    return bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))


def ray_configured() -> bool:
    """Whether the environment names a Ray cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def local_services(home: Path, *, bucket: str, ray: bool = True) -> Iterator[dict[str, str]]:
    """Yield the environment variables that steps and Ray jobs need, valid while this context is open.

    The embedded servers of `home` are started if none is configured and they are not up yet. They stop when the last
    run on `home` has ended in any way. `bucket` is created in the embedded store if it is missing.

    Raises:
        GroundError: the store or the head did not start, or the head that is up uses another store.
    """
    home = home.absolute()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAY_"))}
    environment["FINELOOP_CACHE"] = os.environ.get("FINELOOP_CACHE") or str(home / "cache")
    uses_store, uses_ray = not store_configured(), ray and not ray_configured()
    if uses_store or uses_ray:
        private_folder(home / "cache")
        if any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
            for name in ("no_proxy", "NO_PROXY"):
                hosts = [*filter(None, os.environ.get(name, "").split(",")), "127.0.0.1", "localhost"]
                environment[name] = ",".join(dict.fromkeys(hosts))
    with contextlib.ExitStack() as stack:
        if uses_store:
            environment |= stack.enter_context(_using_store(home, bucket))
        if uses_ray:
            inherited = {**os.environ, **environment}
            environment |= stack.enter_context(_using_ray(home, inherited, with_store=uses_store))
        yield environment


@contextlib.contextmanager
def _using_store(home: Path, bucket: str) -> Iterator[dict[str, str]]:
    with store_service(home).use(arguments=["--bucket", bucket], environment=os.environ) as record:
        endpoint = Endpoint.read(record)
        if endpoint.bucket != bucket:
            seaweedfs.create_bucket(endpoint, bucket)
        try:
            yield endpoint.environment()
        except (FineloopError, OSError) as exc:
            disk = shutil.disk_usage(home / "store")
            if disk.free < max(FULL_BYTES, disk.total * FULL_SHARE) and not isinstance(exc, UserError):
                exc.add_note(
                    f"the disk of {home / 'store'} is full ({disk.free / 1e6:.0f} MB free of {disk.total / 1e6:.0f}): "
                    "free some space"
                )
            raise


@contextlib.contextmanager
def _using_ray(home: Path, environment: Mapping[str, str], *, with_store: bool) -> Iterator[dict[str, str]]:
    """Yield the variables of a client of the Ray head, whose jobs inherit `environment` if it is not up yet.

    `with_store` keeps the embedded store up as long as the head.
    """
    arguments = ["--with-store"] if with_store else []
    with ray_service(home).use(arguments=arguments, environment=environment) as endpoint:
        if endpoint["store_digest"] != ray_head.store_digest(environment):
            raise GroundError(
                f"the local Ray head under {home} works with the store {endpoint['store_url']}, and this command's is "
                f"{ray_head.store_url(environment)} (or has other credentials): wait for the run that uses it, end it "
                "with `fineloop ray down`, or take another --home"
            )
        yield ray_head.client_environment(endpoint)


def store_up(home: Path, bucket: str) -> dict[str, str]:
    """Start the embedded store and keep it up until `store_down`. Returns the variables that an S3 client needs.

    Raises:
        GroundError: it did not start.
    """
    with _using_store(home, bucket) as environment:
        store_service(home).pin()
    return environment


def ray_up(home: Path, bucket: str) -> dict[str, str]:
    """Start the local Ray head, with the embedded store unless one is configured; both stay up until `ray_down`.

    Returns the variables that clients of both need.

    Raises:
        GroundError: it did not start.
    """
    with local_services(home, bucket=bucket) as environment:
        if not ray_configured():
            ray_service(home).pin()
    return environment


def store_down(home: Path) -> bool:
    """Stop the embedded store; return False if it was not up.

    Raises:
        GroundError: a process uses it.
    """
    head = ray_service(home)
    if head.directory.is_dir() and not head.pinned and not head.users():
        ray_down(home)  # a run has just ended, and its head uses the store until it has stopped
    return store_service(home).down(stop_with="end that run, or the local Ray head with `fineloop ray down`")


def ray_down(home: Path) -> bool:
    """Stop the local head; return False if it was not up.

    Raises:
        GroundError: a process uses it.
    """
    return ray_service(home).down(stop_with="end that run first")


def store_environment(home: Path) -> dict[str, str]:
    """Return the variables that an S3 client needs to use the embedded store that is up now. Starts nothing.

    Raises:
        GroundError: none is up.
    """
    if (record := store_service(home).endpoint()) is None:
        raise GroundError(f"no local S3 server is up under {home}: start one with `fineloop store up`")
    return Endpoint.read(record).environment()


def ray_environment(home: Path) -> dict[str, str]:
    """Return the variables that the Jobs API client needs to use the head that is up now. Starts nothing.

    Raises:
        GroundError: none is up.
    """
    if (endpoint := ray_service(home).endpoint()) is None:
        raise GroundError(f"no local Ray head is up under {home}: start one with `fineloop ray up`")
    return ray_head.client_environment(endpoint)
