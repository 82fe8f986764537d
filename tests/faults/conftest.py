"""What the faults are tried on: small adapters in the real S3 server, and what must hold of them afterwards."""

from collections.abc import Callable, Iterable

import pytest

from components.registry.aliases import PRODUCTION, read_alias
from components.registry.event_log import Event, events, is_chain, moves
from components.registry.versions import Version, publish_version, resolve, verify_version
from components.store.store import Store

Publish = Callable[..., str]


@pytest.fixture
def publish() -> Publish:
    """Publishes a tiny version and returns its id."""

    def published(store: Store, weights: str, *, name: str = "icd", run_id: str = "", **files: bytes) -> str:
        body = {"adapter_model.safetensors": weights.encode(), "adapter_config.json": b"{}"}
        return publish_version(store, name, {**body, **files}, lineage={"run_id": run_id or weights}).version

    return published


@pytest.fixture
def assert_sound() -> Callable[..., None]:
    """Fails unless every version is whole, and the log is one chain of moves that ends where the alias is."""

    def check(store: Store, name: str = "icd", *, reported: Iterable[Event] = ()) -> None:
        log = events(store, name)
        for version in {event.body["version"] for event in log if event.kind == "published"}:
            verify_version(store, resolve(store, f"{name}@{version}"))
        pointer = read_alias(store, name, PRODUCTION)
        chain = moves(log, PRODUCTION)
        assert is_chain(chain)
        assert (chain[-1].body["to"], chain[-1].time) == (pointer.version, pointer.since)
        resolved: Version = resolve(store, f"{name}@{PRODUCTION}")
        assert resolved.manifest_sha256 == pointer.manifest_sha256
        assert {event.id for event in reported} <= {event.id for event in chain}

    return check
