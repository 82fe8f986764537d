"""The local Ray head of one home, shared by everything that runs on it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import GroundError
from pipelines.local import ray_process
from pipelines.local.service import ROOT, Service


def service(home: Path) -> Service:
    """The shared head of `home`."""
    return Service("ray", "the local Ray head", home.absolute(), start_timeout_s=150.0)


def configured() -> bool:
    """Whether the environment names a Ray cluster already; it wins over the local head."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def using_ray(home: Path, environment: Mapping[str, str], *, with_store: bool) -> Iterator["RayInUse"]:
    """Use the local head; it starts when it is not up, and stays while anybody uses it.

    `environment` is what its jobs inherit: the whole of this process's with the store's AWS_*. `with_store` says that
    these belong to the embedded store of the same home, which then stays as long as the head does. A head that was
    started with another store is restarted when nobody else uses it.

    Raises:
        GroundError: it did not start, or works with another store for somebody else.
    """
    shared = service(home)
    arguments = ["--with-store"] if with_store else []
    digest = _store_digest(environment)
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(shared.use(arguments=arguments, environment=environment))
        if endpoint["store_digest"] != digest:
            stack.close()
            pinned = shared.pinned
            with contextlib.suppress(GroundError):
                shared.down(stop_with="")
            endpoint = stack.enter_context(shared.use(arguments=arguments, environment=environment))
            if pinned:
                shared.pin()
        if endpoint["store_digest"] != digest:
            raise GroundError(
                f"the local Ray head under {home} is in use with the store {endpoint['store_url']}, and this command's "
                f"is {_store_url(environment)} (or has other credentials): wait for that run, or take another --home"
            )
        yield RayInUse(shared, endpoint)


@dataclass(frozen=True)
class RayInUse:
    """The local head while this process uses it. Its address is settled; it may not answer yet."""

    service: Service
    endpoint: dict[str, Any]

    def wait_ready(self) -> dict[str, str]:
        """Wait until it answers; what the Jobs API client needs."""
        return _environment(self.service.wait_ready())


def ray_down(home: Path) -> bool:
    """Stop the local head; False when it was not up.

    Raises:
        GroundError: somebody uses it.
    """
    return service(home).down(stop_with="end that run first")


def ray_environment(home: Path) -> dict[str, str]:
    """What the Jobs API client needs to use the head that is up now. Starts nothing.

    Raises:
        GroundError: none is up.
    """
    endpoint = service(home).endpoint()
    if endpoint is None:
        raise GroundError(f"no local Ray head is up under {home}: start one with `fineloop ray up`")
    return _environment(endpoint)


def start(directory: Path, announce: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], "RunningHead"]:
    """Start the head with this process's environment: what the keeper runs."""

    def record(url: str, token_path: Path) -> dict[str, Any]:
        return {
            "url": url,
            "token_path": str(token_path),
            "store_url": _store_url(os.environ),
            "store_digest": _store_digest(os.environ),
        }

    head = ray_process.start(directory, announce=lambda url, token_path: announce(record(url, token_path)))
    return record(head.url, head.token_path), RunningHead(head)


@dataclass(frozen=True)
class RunningHead:
    """The head, in its keeper's hands."""

    head: ray_process.Head

    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.head.process.poll() is not None

    def stop(self) -> None:
        """Stop it and wait until it is gone."""
        ray_process.stop(self.head)


def _store_url(environment: Mapping[str, str]) -> str:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "the AWS default"


def _store_digest(environment: Mapping[str, str]) -> str:
    """What jobs inherit that must not differ from what this command uses: the store, the credentials, the code."""
    inherited = {name: value for name, value in environment.items() if name.startswith("AWS_") and value}
    return hashlib.sha256(json.dumps([inherited, str(ROOT)], sort_keys=True).encode()).hexdigest()


def _environment(endpoint: dict[str, Any]) -> dict[str, str]:
    return ray_process.client_environment(endpoint["url"], endpoint["token_path"])
