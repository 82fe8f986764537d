"""Requests and seconds of what people ask of an adapter with thousands of versions, in a store of this benchmark's own.

Each command is timed twice: as the first to ask, which reads every object and leaves an index, and with that index.
With --adapters the versions are those of each of so many, and asked are what a run and a garbage collection ask.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RegistryConfig
from components.promote.by_hand import Person, promote_by_hand
from components.registry import ancestry, collect
from components.registry.aliases import promote, rollback
from components.registry.event_log import append_event, events
from components.registry.versions import list_versions, publish_version, resolve
from components.report.registry_page import write_pages
from components.store.store import Store, encode_json
from pipelines.commands.table import table
from pipelines.local import seaweedfs, server

NAME = "icd"
WRITERS = 16


def fill(store: Store, name: str, versions: int) -> None:
    """Versions by their manifest, lineage and event; nobody reads the weights of those that no alias points at."""

    def one(number: int) -> None:
        version = "v" + hashlib.sha256(str(number).encode()).hexdigest()[:15]
        at = (
            f"2026-01-{1 + number // 86400:02}T{number // 3600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}.000000Z"
        )
        lineage = encode_json({"run_id": f"run-{number}", "dataset": {"dataset_id": f"d{number % 500}"}})
        digest = {"size": len(lineage), "sha256": hashlib.sha256(lineage).hexdigest()}
        about = {"name": name, "version": version, "run_id": f"run-{number}"}
        manifest = {"format": 1, "files": {"lineage.json": digest}, "about": about, "created_at": at}
        key, body = f"adapters/{name}/versions/{version}", encode_json(manifest)
        store.put(f"{key}/lineage.json", lineage)
        store.put(f"{key}/manifest.json", body)
        body_of_event = {
            "version": version,
            "manifest_sha256": hashlib.sha256(body).hexdigest(),
            "run_id": f"run-{number}",
        }
        append_event(store, name, "published", body_of_event, at=at)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(one, range(versions)))


def measure(store: Store, versions: int) -> list[tuple[str, ...]]:
    """A row a command."""
    made = [
        publish_version(
            store,
            NAME,
            {"adapter_model.safetensors": bytes([number]), "adapter_config.json": b"{}"},
            lineage={"run_id": f"real-{number}"},
        ).version
        for number in range(3)
    ]
    promote(store, NAME, made[0])
    sent: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url) or None)
    commands: dict[str, Callable[[], Any]] = {
        "list NAME": lambda: list_versions(store, NAME),
        "show NAME@first digits": lambda: resolve(store, f"{NAME}@{made[1][:8]}"),
        "history": lambda: events(store, NAME),
        "promote": lambda: promote_by_hand(store, f"{NAME}@{made[1]}", Person()),
        "rollback": lambda: rollback(store, NAME),
        "lineage NAME": lambda: ancestry.ancestors(store, resolve(store, f"{NAME}@{made[0]}")),
        "lineage --of dataset": lambda: ancestry.descendants(store, NAME, {"dataset": "d7"}),
    }
    rows: list[tuple[str, ...]] = [("command", "requests", "seconds", "again: requests", "seconds")]
    for name, command in commands.items():
        row = [name]
        for _ in range(2):
            if name == "rollback":
                promote(store, NAME, made[1])
            sent.clear()
            began = time.perf_counter()
            command()
            row += [str(len(sent)), f"{time.perf_counter() - began:.2f}"]
            if name == "promote":
                rollback(store, NAME)
        rows.append(tuple(row))
    return [(f"{versions} versions", "", "", "", ""), *rows]


def measure_many(store: Store, adapters: int, versions: int) -> list[tuple[str, ...]]:
    """Requests of a run's page and of a garbage collection, where there are many adapters."""
    names = [f"{NAME}-{number:04}" for number in range(adapters)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda name: fill(store, name, versions), names))
    sent: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url) or None)
    later = datetime.now(UTC) + timedelta(days=90)
    asked: dict[str, Callable[[], Any]] = {
        "a run's page, the first of all": lambda: write_pages(store, names[0], generated_at="now"),
        "a run's page": lambda: write_pages(store, names[0], generated_at="now"),
        "gc": lambda: collect.removals(store, names, collect.Rules(), now=later),
        "gc, all but two versions of each": lambda: collect.removals(
            store, names, collect.Rules(keep_last=2), now=later
        ),
    }
    rows: list[tuple[str, ...]] = [(f"{adapters} adapters of {versions}", "requests", "a version", "seconds")]
    for what, ask in asked.items():
        sent.clear()
        began = time.perf_counter()
        ask()
        seconds = time.perf_counter() - began
        rows.append((what, str(len(sent)), f"{len(sent) / (adapters * versions):.2f}", f"{seconds:.2f}"))
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as environment:
        running = server.start(seaweedfs.SeaweedFS(Path(directory), "benchmark"))
        try:
            for name, value in seaweedfs.Endpoint.read(running.endpoint).environment().items():
                environment.setenv(name, value)
            store = Store.open(RegistryConfig(bucket="benchmark"))
            if options.adapters > 1:
                print(table(measure_many(store, options.adapters, options.versions)))
            else:
                fill(store, NAME, options.versions)
                print(table(measure(store, options.versions)))
        finally:
            running.stop()


if __name__ == "__main__":
    main()
