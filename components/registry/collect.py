"""What a registry no longer needs, and its removal.

Kept is every version that an alias points at or that ever held one (a decision put it there, and a rollback returns to
it), the parents of what is kept, the newest ones, and all that is younger than an age: a run or a publication may be
on its way to it. Of a run that has decided only its checkpoints go, which nothing resumes any more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from components.registry import runs, versions
from components.registry.aliases import list_aliases
from components.registry.ancestry import of_record
from components.registry.event_log import append_event, events
from components.registry.folders import MANIFEST
from components.registry.history import MOVE_KINDS
from components.registry.names import version_key
from components.registry.records import Decision
from components.registry.store import JSON, ObjectInfo, Store
from components.registry.versions import LINEAGE, Version
from components.shared.errors import ObjectMissing


@dataclass(frozen=True)
class Rules:
    """What is kept beside what is needed."""

    keep_last: int = 10
    """Of each adapter; 0 keeps none for being new."""
    older_than: timedelta = timedelta(days=30)


@dataclass(frozen=True)
class Removal:
    """A version, or the checkpoints of a run, and what goes with it."""

    kind: str
    name: str
    """NAME@VERSION of a version, the run's id of checkpoints."""
    why: str
    keys: tuple[str, ...]
    size_bytes: int
    manifest_sha256: str = ""
    """Of a version."""


def removals(store: Store, names: Sequence[str], rules: Rules, *, now: datetime) -> list[Removal]:
    """What may go of these adapters, and of the runs that decided about them; removes nothing."""
    found: list[Removal] = []
    for name in names:
        found += [
            _of_version(store, version)
            for version in _unneeded(store, name, versions.list_versions(store, name), rules, now)
        ]
    oldest = now - rules.older_than
    for run_id in store.folders("runs/"):
        checkpoints = list(store.list(runs.run_key(run_id, runs.CHECKPOINTS)))
        if not checkpoints or any(info.last_modified > oldest for info in checkpoints):
            continue
        decision = runs.find(store, run_id, Decision)
        if decision is not None and decision.adapter in names:
            found.append(_removal("checkpoints", run_id, f"the run decided to {decision.decision}", checkpoints))
    return found


def remove(store: Store, removal: Removal) -> bool:
    """Carry one out; False where an alias has come to need the version meanwhile.

    Of a version the log is told first, and its manifest goes next: from then on no reader sees it.
    """
    if removal.kind == "checkpoints":
        store.delete(removal.keys)
        return True
    name, _, version = removal.name.partition("@")
    manifest_key = f"{version_key(name, version)}/{MANIFEST}"
    if _points_at(store, name, version):
        return False
    manifest = store.get(manifest_key)
    body = {"version": version, "manifest_sha256": removal.manifest_sha256, "reasons": [removal.why]}
    append_event(store, name, "collected", body)
    store.delete([manifest_key])
    if _points_at(store, name, version):  # moved between the two looks
        store.claim(manifest_key, manifest, content_type=JSON)
        return False
    store.delete(key for key in removal.keys if key != manifest_key)
    return True


def _unneeded(store: Store, name: str, published: Sequence[Version], rules: Rules, now: datetime) -> Iterable[Version]:
    """Of the versions, newest first, those that nothing needs."""
    held = {
        version
        for event in events(store, name)
        if event.kind in MOVE_KINDS
        for version in (event.body["from"], event.body["to"])
    }
    held |= {pointer.version for pointer in list_aliases(store, name)}
    oldest = now - rules.older_than
    kept = [
        version
        for position, version in enumerate(published)
        if version.version in held or position < rules.keep_last or datetime.fromisoformat(version.created_at) > oldest
    ]
    by_uri = {version.uri: version for version in published}
    needed = {version.uri for version in kept}
    while kept:
        parents = {each for each in _parents(store, kept.pop()) if each in by_uri and each not in needed}
        needed |= parents
        kept += [by_uri[uri] for uri in parents]
    return [version for version in published if version.uri not in needed]


def _parents(store: Store, version: Version) -> list[str]:
    try:
        lineage: Any = store.get_json(f"{version_key(version.name, version.version)}/{LINEAGE}")
    except ObjectMissing:
        return []
    return [each.name for each in of_record(lineage if isinstance(lineage, dict) else {}) if each.kind == "parent"]


def _of_version(store: Store, version: Version) -> Removal:
    objects = list(store.list(f"{version_key(version.name, version.version)}/"))
    why = f"published {version.created_at[:10]}, never held an alias"
    return _removal("version", f"{version.name}@{version.version}", why, objects, version.manifest_sha256)


def _removal(kind: str, name: str, why: str, objects: Sequence[ObjectInfo], manifest_sha256: str = "") -> Removal:
    keys, size = tuple(info.key for info in objects), sum(info.size for info in objects)
    return Removal(kind, name, why, keys, size, manifest_sha256)


def _points_at(store: Store, name: str, version: str) -> bool:
    return any(pointer.version == version for pointer in list_aliases(store, name))
