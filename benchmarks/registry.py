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
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.config.schema import RegistryConfig
from components.promote.promote import Person, promote_by_hand
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured
from components.registry import collect
from components.registry.aliases import Cause, promote, rollback
from components.registry.cache import LISTED
from components.registry.collect import all_adapters
from components.registry.event_log import append_event, events
from components.registry.versions import ancestors, descendants, list_versions, publish_version, resolve, version_ids
from components.report.registry_page import Listed, write_pages
from components.report.report import run_report
from components.store.store import Store, encode_json
from pipelines.commands.arguments import table
from pipelines.local import seaweedfs, server
from tests.components.report.example_runs import leave_files

NAME = "icd"
CONFIG = """
[adapter]
name = "{name}"
[model]
base = "org/base"
[data]
source = "rows.jsonl"
"""
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
        "lineage NAME": lambda: ancestors(store, resolve(store, f"{NAME}@{made[0]}")),
        "lineage --of dataset": lambda: descendants(store, NAME, {"dataset": "d7"}),
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


def fill_many(store: Store, names: list[str], versions: int) -> None:
    """Add the adapters that are missing, and the list of everything that their runs wrote."""

    def one(name: str) -> None:
        if len(version_ids(store, name)) < versions:
            fill(store, name, versions)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(one, names))
    listed = [Listed(name, in_production="nothing", since="", num_versions=versions) for name in names]
    store.put_json(LISTED, {each.name: asdict(each) for each in listed})


def night(store: Store, name: str, number: int) -> None:
    """A version that a run has measured and decided on, as its report step finds it."""
    run_id, files = f"night-{number}", {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
    version = publish_version(store, name, files, lineage={"run_id": run_id}).version
    models = {"candidate": Measured(version=version, metrics={"loss": 0.5})}
    runs.write(store, run_id, Evaluation(run_id=run_id, records=300, models=models))
    about = {"adapter": name, "alias": "production", "run_id": run_id, "version": version, "reasons": ("better",)}
    runs.write(store, run_id, Decision(decision="promote", verdict="promote", **about))
    promote(store, name, version, cause=Cause(run_id))


def measure_many(store: Store, names: list[str], versions: int) -> list[tuple[str, ...]]:
    """Requests of a run's pages and report and of a garbage collection, where there are many adapters.

    The indexes that an earlier call has left are deleted first.
    """
    store.delete([info.key for info in store.list("adapters/") if "/index/" in info.key])
    nights = count(len(version_ids(store, names[0])))
    sent: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(request.url) or None)
    later = datetime.now(UTC) + timedelta(days=90)

    def pages() -> Callable[[], Any]:
        night(store, names[0], next(nights))
        return lambda: write_pages(store, names[0], generated_at="now")

    def report(leave: Callable[[Store, str], None] = lambda _store, _run_id: None) -> Callable[[], Any]:
        number = next(nights)
        night(store, names[0], number)
        leave(store, f"night-{number}")
        config = config_file.loads(CONFIG.format(name=names[0]))
        return lambda: run_report(config, store, f"night-{number}")

    def gc_of_all() -> Any:
        return collect.removals(store, names, collect.Rules(keep_last=2), now=later)

    asked: dict[str, Callable[[], Callable[[], Any]]] = {
        "a run's pages, before there is an index": pages,
        "a run's pages, the night after": pages,
        "a run's report with its pages, the night after that": report,
        "the same, another night": report,
        "the same of a run with all 10 files": lambda: report(leave_files),
        "list, before there is one": lambda: lambda: all_adapters(store),
        "list": lambda: lambda: all_adapters(store),
        "gc": lambda: lambda: collect.removals(store, names, collect.Rules(), now=later),
        "gc, all but two versions of each": lambda: gc_of_all,
        "the same again": lambda: gc_of_all,
    }
    rows: list[tuple[str, ...]] = [(f"{len(names)} adapters of {versions}", "requests", "a version", "seconds")]
    for what, prepare in asked.items():
        ask = prepare()
        sent.clear()
        began = time.perf_counter()
        ask()
        seconds = time.perf_counter() - began
        rows.append((what, str(len(sent)), f"{len(sent) / (len(names) * versions):.2f}", f"{seconds:.2f}"))
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the store, so that the next call goes on filling it")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with (
        nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as environment,
    ):
        running = server.start(seaweedfs.SeaweedFS(Path(directory), "benchmark"))
        try:
            for name, value in seaweedfs.Endpoint.read(running.endpoint).environment().items():
                environment.setenv(name, value)
            store = Store.open(RegistryConfig(bucket="benchmark"))
            if options.adapters > 1:
                names = [f"{NAME}-{number:04}" for number in range(options.adapters)]
                fill_many(store, names, options.versions)
                print(table(measure_many(store, names, options.versions)))
            else:
                fill(store, NAME, options.versions)
                print(table(measure(store, options.versions)))
        finally:
            running.stop()


if __name__ == "__main__":
    main()
