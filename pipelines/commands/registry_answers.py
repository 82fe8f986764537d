"""The registry for people and for scripts: what `fineloop adapters` answers."""

from typing import Any

from components.registry import aliases, serving, versions
from components.registry.aliases import Event
from components.registry.records import finite
from components.registry.store import Store
from components.registry.versions import Version
from components.shared.errors import ObjectMissing
from components.shared.metrics import METRICS
from pipelines.commands.arguments import Answer
from pipelines.commands.table import table

TOLD_LENGTH = 100


def adapters_shown(store: Store) -> Answer:
    """Every adapter with its newest version and its aliases."""
    adapters: list[dict[str, Any]] = [
        {
            "name": name,
            "newest": published[0].version if published else None,
            "versions": len(published),
            "aliases": {pointer.alias: pointer.version for pointer in aliases.list_aliases(store, name)},
        }
        for name in versions.list_adapters(store)
        for published in [versions.list_versions(store, name)]
    ]
    rows = [
        (
            a["name"],
            str(a["versions"]),
            a["newest"] or "-",
            " ".join(f"{k}={v}" for k, v in a["aliases"].items()) or "-",
        )
        for a in adapters
    ]
    header = ("adapter", "versions", "newest", "aliases")
    text = table([header, *rows]) if rows else f"no adapters in {store.uri('')} yet: `fineloop run` makes one"
    return Answer({"adapters": adapters}, text)


def versions_shown(store: Store, name: str) -> Answer:
    """Every version of an adapter, newest first.

    Raises:
        ObjectMissing: there is no such adapter.
    """
    found = versions.list_versions(store, name)
    if not found:
        raise ObjectMissing(f"there is no adapter {name!r} in {store.uri('')}: see `fineloop adapters list`")
    rows = [("version", "published", "run", "aliases")]
    rows += [(v.version, v.created_at[:19], v.run_id or "-", ", ".join(v.aliases) or "-") for v in found]
    return Answer(
        {"name": name, "versions": [_described(version) for version in versions.all_evaluated(store, found)]},
        table(rows),
    )


def version_shown(store: Store, version: Version) -> Answer:
    """One version."""
    served = serving.recorded(versions.read_lineage(store, version))
    body = {**_described(version), "servable_as": served.servable_as, "serving": served.notes}
    metrics = ", ".join(
        f"{metric.label} {metric.text(value)}"
        for metric in METRICS.values()
        if (value := finite(version.metrics.get(metric.key))) is not None
    )
    rows = [
        ("adapter", version.name),
        ("version", version.version),
        ("uri", version.uri),
        ("aliases", ", ".join(version.aliases) or "-"),
        ("published", version.created_at),
        ("run", version.run_id or "-"),
        ("metrics", metrics or "-"),
        ("manifest", f"sha256 {version.manifest_sha256}"),
        ("serve as", served.servable_as),
        *(("", note) for note in served.notes),
    ]
    return Answer(body, table(rows))


def move_shown(name: str, event: Event) -> Answer:
    """A promotion or a rollback."""
    move = event.move()
    return Answer(move, f"{name}@{move['alias']}: {move['from'] or 'nobody'} -> {move['to']}")


def history_shown(store: Store, name: str) -> Answer:
    """The event log, oldest first; the text shortens long reasons.

    Raises:
        ObjectMissing: there is no such adapter.
    """
    log = aliases.events(store, name)
    if not log:
        raise ObjectMissing(f"there is no adapter {name!r} in {store.uri('')}: see `fineloop adapters list`")
    rows = [(event.time[:19], event.kind, _told(event)) for event in log]
    return Answer({"name": name, "events": [vars(event) for event in log]}, table(rows))


def _told(event: Event) -> str:
    body = event.body
    if "to" in body:
        by = f" by {body['actor']}" if body.get("actor") else ""
        why = f": {body['reason']}" if body.get("reason") else ""
        told = f"{body['alias']}: {body['from'] or 'nobody'} -> {body['to']}{by}{why}"
    else:
        reasons = "; ".join(body.get("reasons", []))
        told = f"{body.get('version', '')}{': ' + reasons if reasons else ''}"
    return told if len(told) <= TOLD_LENGTH else told[: TOLD_LENGTH - 3] + "..."


def _described(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "version_uri": version.uri,
        "created_at": version.created_at,
        "run_id": version.run_id,
        "aliases": list(version.aliases),
        "manifest_sha256": version.manifest_sha256,
        "metrics": dict(version.metrics),
    }
