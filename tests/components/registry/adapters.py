"""Small adapters in the store, and where their aliases are."""

from typing import Any

from components.registry.aliases import read_alias
from components.registry.event_log import events
from components.registry.versions import Version, publish_version
from components.store.store import Store


def published(store: Store, weights: bytes, *, name: str = "icd", run_id: str = "", **more: Any) -> Version:
    """A version of these weights; `more` are keys of its lineage."""
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    return publish_version(store, name, files, lineage={"run_id": run_id, **more})


def holder(store: Store, alias: str = "production", *, name: str = "icd") -> str | None:
    pointer = read_alias(store, name, alias)
    return pointer.version if pointer else None


def moves(store: Store) -> list[tuple[str, str | None, str]]:
    return [(event.kind, event.body["from"], event.body["to"]) for event in events(store, "icd") if "to" in event.body]


def requests_of(store: Store) -> list[str]:
    """The addresses of all requests from now on."""
    sent: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url) or None)
    return sent
