"""The registry for people and for scripts: what `fineloop adapters` answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from components.handover.serve_manifest import recorded
from components.promote.announce import NOTIFIED
from components.records.steps import finite
from components.registry import event_log, versions
from components.registry.audit import Audit
from components.registry.collect import Removal, all_adapters
from components.registry.event_log import Event
from components.registry.lineage import Ancestor, tree
from components.registry.versions import Version
from components.shared.metrics import metrics_of
from components.shared.protocol import counted
from components.store.store import Store
from pipelines.commands.arguments import Answer, table

LONGEST_EVENT = 100


def adapters_shown(store: Store) -> Answer:
    """Every adapter with its newest version and its aliases."""
    adapters: list[dict[str, Any]] = [
        {"name": name, "newest": each.newest, "versions": each.versions, "aliases": each.aliases}
        for name, each in all_adapters(store).items()
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
        UnknownName: there is no such adapter.
    """
    versions.require_adapter(store, name)
    found = versions.list_versions(store, name)
    rows = [("version", "published", "run", "aliases")]
    rows += [(v.version, v.created_at[:19], v.run_id or "-", ", ".join(v.aliases) or "-") for v in found]
    return Answer(
        {"name": name, "versions": [_described(version) for version in versions.all_evaluated(store, found)]},
        table(rows),
    )


def version_shown(store: Store, version: Version) -> Answer:
    """One version."""
    served = recorded(versions.read_lineage(store, version))
    body = {**_described(version), "servable_as": served.servable_as, "serving": served.notes}
    metrics = ", ".join(
        f"{metric.label} {metric.text(value)}"
        for metric in metrics_of(version.metrics)
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


def move_shown(name: str, event: Event, announced: Mapping[str, str], *, moved: bool) -> Answer:
    """A promotion or a rollback, and the outcome of its notifications; `moved` is False where it changed nothing."""
    move = event.move()
    text = f"{move['from'] or 'none'} -> {move['to']}"
    if not moved:
        text = f"already {move['to']} since {event.time[:16].replace('T', ' ')} UTC"
    elif before := event.body.get("evidence", {}).get("anchor_before"):
        text += f"\nlater candidates are held to {move['to']} as the best version so far, in the place of {before}"
    body: dict[str, Any] = {**move, **({} if moved else {"moved": False})}
    return Answer({**body, **({"announced": dict(announced)} if announced else {})}, f"{name}@{move['alias']}: {text}")


def announced_shown(name: str, event: Event, announced: Mapping[str, str]) -> Answer:
    """What was notified of an alias; exit code 1 where a notification failed."""
    alias, version = event.body["alias"], event.body["to"]
    rows = [(f"announce.{key}", outcome) for key, outcome in announced.items()]
    failed = any(outcome != NOTIFIED for outcome in announced.values())
    body = {"name": name, "alias": alias, "version": version, "announced": dict(announced)}
    return Answer(body, f"{name}@{alias} is {version}\n{table(rows)}", exit_code=1 if failed else 0)


def history_shown(store: Store, name: str) -> Answer:
    """The event log, oldest first; the text shortens long reasons.

    Raises:
        UnknownName: there is no such adapter.
    """
    versions.require_adapter(store, name)
    log = event_log.events(store, name)
    rows = [(event.time[:19], event.kind, _event_text(event)) for event in log]
    return Answer({"name": name, "events": [vars(event) for event in log]}, table(rows))


def ancestry_shown(found: list[tuple[Version, list[Ancestor]]]) -> Answer:
    """What a version and those that it grew from were made of."""
    body = [
        {"name": each.name, "version": each.version, "made_from": [asdict(ancestor) for ancestor in made_from]}
        for each, made_from in found
    ]
    return Answer({"versions": body}, "\n".join(tree(found)))


def descendants_shown(name: str, found: list[Version]) -> Answer:
    """The versions that were made of something."""
    rows = [("version", "published", "run", "aliases")]
    rows += [(v.version, v.created_at[:19], v.run_id or "-", ", ".join(v.aliases) or "-") for v in found]
    return Answer({"name": name, "versions": [_described(version) for version in found]}, table(rows))


def removals_shown(found: Sequence[Removal], *, deleted: bool) -> Answer:
    """What went, or would go."""
    size = sum(each.size_bytes for each in found)
    body = {
        "deleted": deleted,
        "bytes": size,
        "removals": [
            {"kind": each.kind, "name": each.name, "why": each.why, "objects": len(each.keys), "bytes": each.size_bytes}
            for each in found
        ],
    }
    text = f"{len(found)} {'removed' if deleted else 'would go (--delete removes them)'}, {size / 1e6:.1f} MB"
    rows = [(each.kind, each.name, f"{each.size_bytes / 1e6:.1f} MB", each.why) for each in found]
    return Answer(body, "\n".join([*([table(rows)] if rows else []), text]))


def audit_shown(audits: Sequence[Audit]) -> Answer:
    """What an audit read and found; exit code 1 where it found anything."""
    findings = [finding for audit in audits for finding in audit.findings]
    body = {
        "adapters": [{"name": audit.name, "versions": audit.versions, "events": audit.events} for audit in audits],
        "findings": [asdict(finding) for finding in findings],
    }
    counts = {"version": sum(audit.versions for audit in audits), "event": sum(audit.events for audit in audits)}
    read = ", ".join(counted(number, noun) for noun, number in {"adapter": len(audits), **counts}.items())
    found = counted(len(findings), "finding") if findings else "no findings"
    lines = [f"{finding.where}: {finding.what}" for finding in findings]
    return Answer(body, "\n".join([f"{read}: {found}", *lines]), exit_code=1 if findings else 0)


def _event_text(event: Event) -> str:
    body = event.body
    if "to" in body:
        by = f" by {body['actor']}" if body.get("actor") else ""
        why = f": {body['reason']}" if body.get("reason") else ""
        text = f"{body['alias']}: {body['from'] or 'none'} -> {body['to']}{by}{why}"
    else:
        reasons = " ".join(body.get("reasons", []))
        text = f"{body.get('version', '')}{': ' + reasons if reasons else ''}"
    return text if len(text) <= LONGEST_EVENT else text[: LONGEST_EVENT - 3] + "..."


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
