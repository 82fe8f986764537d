"""The S3 server and the Ray head of one home, shared by everything that runs on it.

The environment takes precedence: with AWS_ENDPOINT_URL no store is started, with RAY_ADDRESS no Ray head.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from components.shared.errors import FineloopError, GroundError, UserError
from pipelines.local import ray_head, seaweedfs
from pipelines.local.ray_head import RayHead
from pipelines.local.seaweedfs import Endpoint, SeaweedFS
from pipelines.local.server import Service, private_folder

FULL_BYTES, FULL_SHARE = 64e6, 0.01
"""Free disk space below which SeaweedFS stops to write, or soon will (its `minFreeSpacePercent`)."""


def store_service(home: Path) -> Service:
    """The shared S3 server of `home`."""
    return Service("store", SeaweedFS.title, home.absolute())


def ray_service(home: Path) -> Service:
    """Return the shared Ray head of `home`."""
    return Service("ray", RayHead.title, home.absolute())


def store_configured() -> bool:
    """Whether the environment names a store."""
    return bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))


def ray_configured() -> bool:
    """Whether the environment names a Ray cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def local_services(home: Path, *, bucket: str, ray: bool = True) -> Iterator[dict[str, str]]:
    """Yield the environment variables that steps and Ray jobs need, valid while this context is open.

    The embedded servers of `home` are started if none is configured and they are not up yet, with the bucket. They stop
    when the last run on `home` has ended in any way. Raises GroundError: the store or the head did not start, or the
    head that is up uses another store.
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
            endpoint = stack.enter_context(
                ray_service(home).use(bucket=bucket if uses_store else "", environment=inherited)
            )
            if endpoint["store_digest"] != ray_head.store_digest(inherited):
                raise GroundError(
                    f"the local Ray head under {home} works with the store {endpoint['store_url']}, and this command's "
                    f"is {ray_head.store_url(inherited)} (or has other credentials): wait for the run that uses it, "
                    "end it with `fineloop ray down`, or take another --home"
                )
            environment |= ray_head.client_environment(endpoint)
        yield environment


@contextlib.contextmanager
def _using_store(home: Path, bucket: str) -> Iterator[dict[str, str]]:
    with store_service(home).use(bucket=bucket, environment=os.environ) as record:
        endpoint = Endpoint.read(record)
        if endpoint.bucket != bucket:
            seaweedfs.make_bucket(endpoint, bucket)
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


def up(name: str, home: Path, bucket: str) -> dict[str, str]:
    """Start `store`, or `ray` with the store that it uses, and keep it up until `down`; return a client's variables."""
    if name == "store":
        with _using_store(home, bucket) as environment:
            store_service(home).pin()
        return environment
    with local_services(home, bucket=bucket) as environment:
        if not ray_configured():
            ray_service(home).pin()
    return environment


def down(name: str, home: Path) -> bool:
    """Stop `store` or `ray`; return False if it was not up. Raises GroundError if a process uses it."""
    head = ray_service(home)
    if name == "ray":
        return head.down()
    if not head.pinned:
        with contextlib.suppress(GroundError):
            head.down()  # a run has just ended, and its head uses the store until it has stopped
    return store_service(home).down()


def client_environment(name: str, home: Path) -> dict[str, str]:
    """Return the variables of a client of the `store` or `ray` that is up now; raises GroundError if none is."""
    service = store_service(home) if name == "store" else ray_service(home)
    if (endpoint := service.endpoint()) is None:
        raise GroundError(f"{service.title} is not up under {home}: start it with `fineloop {name} up`")
    return Endpoint.read(endpoint).environment() if name == "store" else ray_head.client_environment(endpoint)
