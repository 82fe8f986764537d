"""The ground a run stands on: an S3 store and a Ray cluster, configured or started here."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.local import ray_head, store

PASSED_ON = ("AWS_", "RAY_")


@contextlib.contextmanager
def ground(home: Path, *, bucket: str, ray: bool = True) -> Iterator[dict[str, str]]:
    """Yield the environment variables that steps and Ray jobs need, valid while this context is open.

    What the environment already names wins: with AWS_ENDPOINT_URL no store is started, with RAY_ADDRESS no Ray head.
    Else the embedded ones of `home` start, unless they are up, and stop when the last run on `home` has ended, however
    it ended. `bucket` is created in the embedded store when it is missing.

    Raises:
        GroundError: the store or the head did not start, or the head is in use with another store.
    """
    home = home.absolute()
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    environment["FINELOOP_CACHE"] = os.environ.get("FINELOOP_CACHE") or str(home / "cache")
    with contextlib.ExitStack() as stack:
        in_use = None if store.configured() else stack.enter_context(store.using_store(home, bucket))
        if in_use is not None:
            environment |= in_use.environment | _without_proxy()
        wants_head = ray and not ray_head.configured()
        if wants_head:
            environment |= _without_proxy()
        # The store and the head start side by side: the store's address is settled before it answers.
        using_head = stack.enter_context(contextlib.ExitStack())
        head = _use_head(using_head, home, environment, with_store=in_use is not None) if wants_head else None
        if in_use is not None:
            settled = in_use.wait_ready()
            if head is not None and settled.items() - environment.items():  # it had to take other ports after all
                using_head.close()
                head = _use_head(using_head, home, environment | settled, with_store=True)
            environment |= settled
        if head is not None:
            environment |= head.wait_ready()
        yield environment


def _use_head(
    stack: contextlib.ExitStack, home: Path, environment: dict[str, str], *, with_store: bool
) -> ray_head.RayInUse:
    inherited = {**os.environ, **environment}
    return stack.enter_context(ray_head.using_ray(home, inherited, with_store=with_store))


def ray_up(home: Path, *, bucket: str) -> dict[str, str]:
    """Start the local Ray head, with the embedded store unless one is configured; both stay until `ray_down`.

    Returns what a client needs to use both.

    Raises:
        GroundError: it did not start.
    """
    with ground(home, bucket=bucket) as environment:
        if not ray_head.configured():
            ray_head.service(home).pin()
    return environment


def _without_proxy() -> dict[str, str]:
    """Keep a configured proxy from the servers on loopback."""
    if not any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return {}
    direct = {}
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [*filter(None, os.environ.get(name, "").split(",")), "127.0.0.1", "localhost"]
        direct[name] = ",".join(dict.fromkeys(hosts))
    return direct
