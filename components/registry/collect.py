"""Garbage collection of a registry: what it no longer needs, and the removal.

A version is kept if an alias points at it or ever did, if it waits for a person's approval, or if a run under way made
it or goes on from it; so are the parents of kept versions, the newest ones, and all that is younger than an age. One
that a trusted key has revoked counts neither as held nor as new once no alias points at it. Datasets and bases are kept
for kept versions and for runs under way: those that have not ended, and wrote something within the age, at least a day.
No index is trusted: an entry counts only if it has the MD5 that the store gives for the object; see `Index.documents`.
"""

import contextlib
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from itertools import chain
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from components.config.methods import METHODS, OWN_BASE
from components.records import runs
from components.records.runs import Replayed
from components.records.steps import Decision, Evaluation, TrainResult
from components.registry import cache, signing, versions
from components.registry.aliases import list_aliases
from components.registry.cache import READS_AT_ONCE, Index, changing
from components.registry.event_log import MOVE_KINDS, Event, append_event, event_at, events_key, parse_log, waiting
from components.registry.identity import VERSION_PATTERN, adapter_key, version_key
from components.registry.lineage import Ancestor, of_record
from components.registry.versions import LINEAGE, Version
from components.shared.errors import IntegrityError
from components.store import folders
from components.store.folders import MANIFEST
from components.store.store import JSON, ObjectInfo, Store, decode_json


@dataclass(frozen=True)
class Summary:
    """What the list of all adapters says of one."""

    newest: str | None
    """The version that was published last."""
    versions: int
    aliases: dict[str, str]
    """Version by alias."""
    mark: str
    """The adapter's mark before it was read; see `cache`."""


_SUMMARY = TypeAdapter(Summary)


@dataclass(frozen=True, kw_only=True)
class VersionWithInputs(Version):
    """A version with what decides whether it is needed, and what it needs."""

    made_from: tuple[Ancestor, ...]
    is_revoked: bool


@dataclass(frozen=True)
class Listing:
    """One listing of an adapter's folder, whose documents are read when they are asked for."""

    store: Store
    name: str
    objects: Sequence[ObjectInfo]

    @classmethod
    def of(cls, store: Store, name: str) -> "Listing":
        return cls(store, name, list(store.list(adapter_key(name, ""))))

    @cached_property
    def by_version(self) -> dict[str, list[ObjectInfo]]:
        """The objects of each version, those included whose publication has not ended."""
        return _of_versions(self.objects, version_key(self.name, ""))

    @cached_property
    def whole(self) -> set[str]:
        """The versions whose publication has ended."""
        keys = {info.key for info in self.objects}
        return {version for version in self.by_version if _key(self.name, version, MANIFEST) in keys}

    def published(self) -> list[VersionWithInputs]:
        """Every version, newest first. Raises IntegrityError if a manifest or a lineage is damaged."""
        published = [entry for version in self.by_version if (entry := self._published(version))]
        return sorted(published, key=lambda entry: (entry.created_at, entry.version), reverse=True)

    def log(self) -> list[Event]:
        """The events, oldest first. Raises IntegrityError if what lies there is none."""
        keys = [info.key for info in self.objects if info.key.startswith(events_key(self.name))]
        objects = ((key, body) for key in keys if (body := self._content(key)) is not None)
        log, junk = parse_log(self.store, self.name, objects)
        if junk:
            key, why = next(iter(junk.items()))
            raise IntegrityError(
                f"{self.store.uri(key)} is no event ({why}), so it is unknown what held an alias, "
                "and nothing is removed: remove the object, if `fineloop adapters audit` says no more of the log"
            )
        return log

    @cached_property
    def _bodies(self) -> dict[str, bytes]:
        signed = (signing.signatures_key(self.name),) if self.store.trusted_keys else ()
        of_versions = {_key(self.name, version, file) for version in self.by_version for file in (MANIFEST, LINEAGE)}
        within = (events_key(self.name), *signed)
        deciding = [info for info in self.objects if info.key in of_versions or info.key.startswith(within)]
        index = Index(self.store, self.name, "documents")
        bodies = index.documents("documents", deciding)
        index.keep()
        return bodies

    @cached_property
    def _signatures(self) -> dict[str, list[ObjectInfo]]:
        return _of_versions(self.objects, signing.signatures_key(self.name)) if self.store.trusted_keys else {}

    def _published(self, version: str) -> VersionWithInputs | None:
        store, uri = self.store, self.store.uri(version_key(self.name, version))
        body = self._bodies.get(_key(self.name, version, MANIFEST))
        if body is None:  # a publication that has not ended
            return None
        manifest = folders.parse_manifest(body, f"{uri}/{MANIFEST}")
        lineage = self._content(_key(self.name, version, LINEAGE))
        if lineage is None or folders.digest_of(lineage) != manifest.files.get(LINEAGE):
            raise IntegrityError(
                f"{uri}/{LINEAGE} is not the one that was published, so it is unknown what {version} needs: "
                f"nothing is removed; `fineloop adapters audit {self.name}` tells what is damaged"
            )
        objects, trusted = self._signatures.get(version, []), store.trusted_keys
        statements = signing.statements(
            store, self.name, version, manifest.sha256, trusted, objects=objects, bodies=self._bodies
        )
        published = versions.of_manifest(store, self.name, version, manifest)
        made_from = tuple(of_record(decode_json(lineage, uri)))
        return VersionWithInputs(**vars(published), made_from=made_from, is_revoked=bool(statements.revoked_by))

    def _content(self, key: str) -> bytes | None:
        """Read by itself where the listing lacks it, whose pages are not all of one moment."""
        if key in self._bodies:
            return self._bodies[key]
        stored = self.store.read(key)
        return stored[0] if stored else None


def _key(name: str, version: str, file: str) -> str:
    return f"{version_key(name, version)}/{file}"


def all_adapters(store: Store) -> dict[str, Summary]:
    """Every adapter by its name, to be shown. Read are those that have changed since the list of them was written."""
    # The marks first, then the list, then the adapters: what changes meanwhile has another mark the next time.
    marks = {info.key.removeprefix(cache.CHANGED): info for info in store.list(cache.CHANGED)}
    was, now = cache.read_entries(store), datetime.now(UTC)
    listed = {name: entry.get(cache.LISTING) for name, entry in was[0].items()}

    def one(name: str) -> Summary:
        mark = marks[name].etag if name in marks else ""
        with contextlib.suppress(ValidationError):
            if (entry := _SUMMARY.validate_python(listed.get(name))).mark == mark:
                return entry
        return summary(store, name, mark)

    names = versions.list_adapters(store)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        summaries = dict(zip(names, pool.map(one, names), strict=True))
    settled = {name: asdict(entry) for name, entry in summaries.items() if cache.is_settled(marks.get(name), now)}
    if any(listed.get(name) != entry for name, entry in settled.items()):
        changed = {name: {cache.LISTING: entry} for name, entry in settled.items()}
        cache.write_entries(store, lambda old: old | {n: old.get(n, {}) | new for n, new in changed.items()}, was)
    return summaries


def summary(store: Store, name: str, mark: str) -> Summary:
    """Read one adapter: a listing, its aliases, and its events from the newest back to a publication."""
    listing = Listing.of(store, name)
    keys = [info.key for info in listing.objects]
    log = sorted((key for key in keys if key.startswith(events_key(name))), reverse=True)
    bodies = (event.body for key in log if (event := event_at(store, name, key)) and event.kind == "published")
    first = (body for body in bodies if not body.get("again"))  # not by a run that trained the same
    newest = next((version for body in first if (version := body.get("version")) in listing.whole), None)
    aliases = {pointer.alias: pointer.version for pointer in list_aliases(store, name)}
    return Summary(newest, len(listing.whole), aliases, mark)


DATASETS, BASES, RUNS = "datasets/", "bases/", "runs/"
A_RUN_RESTS = timedelta(days=1)
"""How long a run that has not ended may write nothing, such as in a queue, and still count as under way."""


@dataclass(frozen=True)
class Rules:
    """What is kept in addition to what is needed."""

    keep_last: int = 10
    """Number of newest versions of each adapter to keep; 0 keeps none for being new."""
    older_than: timedelta = timedelta(days=30)


Kind = Literal["version", "unfinished", "checkpoints", "dataset", "base"]


@dataclass(frozen=True)
class Removal:
    """Something that may be removed, and the objects that go with it."""

    kind: Kind
    name: str
    """NAME@VERSION for a version or what is left of one, the run's id for checkpoints, otherwise the folder's name."""
    why: str
    keys: tuple[str, ...]
    size_bytes: int
    manifest_sha256: str = ""
    """SHA-256 of a version's manifest; empty for other kinds."""
    runs_seen: frozenset[str] = frozenset()
    """The runs that existed then; a newer run may have come to need it."""
    log_seen: dict[str, str] = field(default_factory=dict)
    """The keys of the events that have been seen: those of newer publications with the version, others with nothing."""


def removals(store: Store, names: Sequence[str], rules: Rules, *, now: datetime) -> list[Removal]:
    """Return what may be removed of these adapters and of the runs that decided about them; removes nothing.

    If `names` holds all adapters, this includes the datasets and bases that no kept version was made from. Raises
    IntegrityError if an event, a manifest or a lineage is damaged, so that what is needed cannot be known.
    """
    oldest = now - rules.older_than
    by_run = _by_folder(store.list(RUNS), RUNS)  # before the versions: what a run has made since, it keeps itself
    still = min(oldest, now - A_RUN_RESTS)
    recent = [_under_way(store, run_id) for run_id, objects in by_run.items() if _newest(objects) > still]
    under_way = [run for run in recent if run]
    all_trained = all(run.made for run in under_way)
    runs_seen = frozenset(by_run)

    def look(name: str) -> tuple[list[VersionWithInputs] | None, list[Removal]]:
        listing = Listing.of(store, name)
        killed = partial(_removal, "unfinished", why="left by a killed publication or removal", runs_seen=runs_seen)
        left = [
            killed(f"{name}@{version}", objects=objects)
            for version, objects in listing.by_version.items()
            if all_trained and version not in listing.whole and _newest(objects) <= oldest
        ]
        if not store.trusted_keys and len(listing.by_version) <= rules.keep_last:
            return None, left  # all are new, and need not be read
        needed, unneeded = _sorted_out(listing, rules, oldest, under_way)
        log = {info.key: "" for info in listing.objects if info.key.startswith(events_key(name))}
        removable = []
        for version in unneeded:
            why = f"published {version.created_at[:10]}, {'revoked' if version.is_revoked else 'never held an alias'}"
            objects = listing.by_version[version.version]
            removal = _removal("version", f"{name}@{version.version}", why, objects, runs_seen)
            removable.append(replace(removal, manifest_sha256=version.manifest_sha256, log_seen=log))
        return needed, [*removable, *left]

    everything = versions.list_adapters(store)
    looked_at = [name for name in everything if name in names]
    with ThreadPoolExecutor(4) as pool:  # of each adapter, several objects are read at once
        looks = dict(zip(looked_at, pool.map(look, looked_at), strict=True))
    removable = [removal for _, of_adapter in looks.values() for removal in of_adapter]
    for run_id, objects in by_run.items():
        checkpoints = [info for info in objects if info.key.startswith(runs.run_key(run_id, runs.CHECKPOINTS))]
        decision = runs.decision_of(store, run_id) if checkpoints and _newest(checkpoints) <= oldest else None
        if decision is not None and decision.adapter in names:
            removable.append(_removal("checkpoints", run_id, f"the run decided to {decision.decision}", checkpoints))
    if set(everything) <= set(names):
        # These are read only if something shared may be removed.
        kept = (
            looks[name][0] or _sorted_out(Listing.of(store, name), rules, oldest, under_way)[0] for name in everything
        )
        removable += _shared(store, chain.from_iterable(kept), runs_seen, under_way, oldest)
    return removable


def remove(store: Store, removal: Removal) -> bool:
    """Carry out a removal; False if an alias, or a run that began meanwhile, may have come to need it.

    A version's removal is logged first. The object that makes a folder exist is deleted next, and then the rest, so
    that no reader sees a part.
    """
    if removal.kind == "checkpoints":
        store.delete(removal.keys)
        return True
    if set(store.folders(RUNS)) - removal.runs_seen:
        return False
    if removal.kind in ("dataset", "base"):
        heads = [key for key in removal.keys if key.endswith((f"/{MANIFEST}", "/chosen.json"))]
        store.delete(heads)
        store.delete(key for key in removal.keys if key not in heads)
        return True
    name, _, version = removal.name.partition("@")
    manifest_key = f"{version_key(name, version)}/{MANIFEST}"
    if removal.kind == "unfinished":
        is_unfinished = not store.exists(manifest_key)
        store.delete(removal.keys if is_unfinished else ())
        return is_unfinished
    if _is_needed(store, removal, name, version):
        return False
    manifest = store.get(manifest_key)
    body = {"version": version, "manifest_sha256": removal.manifest_sha256, "reasons": [removal.why]}
    with changing(store, name):
        append_event(store, name, "collected", body)
        store.delete([manifest_key])
        is_needed = True
        try:
            is_needed = _is_needed(store, removal, name, version)  # to whoever came between, and looks after writing
        finally:  # also where the store no longer answers who points where
            if is_needed:
                store.claim(manifest_key, manifest, content_type=JSON)
    if is_needed:
        return False
    store.delete(key for key in removal.keys if key != manifest_key)
    return True


def _sorted_out(
    listing: Listing, rules: Rules, oldest: datetime, under_way: Sequence["_UnderWay"]
) -> tuple[list[VersionWithInputs], list[VersionWithInputs]]:
    """Divide the versions into needed and unneeded ones, each newest first."""
    published, log = listing.published(), listing.log()
    pointers = list_aliases(listing.store, listing.name, pass_over_damaged=False)
    holders = {pointer.alias: pointer.version for pointer in pointers}
    used = {version for event in log if event.kind in MOVE_KINDS for version in (event.body["from"], event.body["to"])}
    used |= {*holders.values(), *waiting(log, holders)}
    made = {uri_or_id for run in under_way for uri_or_id in (run.run_id, run.made) if uri_or_id}
    young = oldest.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    used |= {str(event.body.get("version")) for event in log if event.kind == "published" and event.time > young}
    starts = tuple(start for run in under_way for start in run.starts)
    used -= {version.version for version in published if version.is_revoked} - set(holders.values())
    used |= {version.version for version in [entry for entry in published if not entry.is_revoked][: rules.keep_last]}
    kept = [
        version
        for version in published
        if version.version in used
        or version.created_at > young
        or not made.isdisjoint({version.run_id, version.uri})
        or f"{version.name}@{version.version}".startswith(starts)
    ]
    by_uri = {version.uri: version for version in published}
    needed = {version.uri for version in kept}
    while kept:
        parents = {uri for uri in _names(kept.pop().made_from, "parent") if uri in by_uri and uri not in needed}
        needed |= parents
        kept += [by_uri[uri] for uri in parents]
    unneeded = [version for version in published if version.uri not in needed]
    return [version for version in published if version.uri in needed], unneeded


def _shared(
    store: Store,
    kept: Iterable[VersionWithInputs],
    runs_seen: frozenset[str],
    under_way: Sequence["_UnderWay"],
    oldest: datetime,
) -> list[Removal]:
    """Return the old datasets and bases that no kept version was made from and no run under way may need."""

    def old(folder: str, may_be_needed: Iterable[bool]) -> dict[str, list[ObjectInfo]]:
        grouped = {} if any(may_be_needed) else _by_folder(store.list(folder), folder)
        return {name: objects for name, objects in grouped.items() if _newest(objects) <= oldest}

    old_datasets = old(DATASETS, (run.may_need_any_dataset for run in under_way))
    old_bases = old(BASES, (run.may_need_a_base for run in under_way))
    if not (old_datasets or old_bases):
        return []  # and nothing of what is kept is read
    made_from = [ancestor for version in kept for ancestor in version.made_from]
    datasets = {*_names(made_from, "dataset"), *(dataset for run in under_way for dataset in run.datasets)}
    bases = set(_names(made_from, "base"))
    needs_base = {store.uri(f"{BASES}{name}"): name for name in old_bases}
    used = {name for uri, name in needs_base.items() if any(f"{base}/".startswith(f"{uri}/") for base in bases)}
    dataset = partial(_removal, "dataset", why="no version or run needs it", runs_seen=runs_seen)
    base = partial(_removal, "base", why="no version stands on it", runs_seen=runs_seen)
    return [
        *(dataset(name, objects=objects) for name, objects in old_datasets.items() if name not in datasets),
        *(base(name, objects=objects) for name, objects in old_bases.items() if name not in used),
    ]


@dataclass(frozen=True)
class _UnderWay:
    """A run that has not ended, and what its training may need; nothing once it has been evaluated."""

    run_id: str
    made: str
    """URI of the version that its training published; an earlier run may have published it before."""
    datasets: AbstractSet[str] = frozenset()
    may_need_any_dataset: bool = False
    may_need_a_base: bool = False
    starts: tuple[str, ...] = ()
    """NAME@VERSION that the training may go on from; the version may be given by its first digits."""


def _under_way(store: Store, run_id: str) -> _UnderWay | None:
    """Return the run if it is under way; None if it has ended: its candidate was held, or it was skipped. Raises
    IntegrityError if one of its records is damaged."""
    start = runs.run_key(run_id, runs.START)
    try:
        decision = runs.find(store, run_id, Decision, to_show=True)
        if decision is not None and not decision.promoted:
            return None
        trained = runs.find(store, run_id, TrainResult)
        made = trained.version_uri if trained else ""
        if decision or runs.find(store, run_id, Evaluation, to_show=True):
            return _UnderWay(run_id, made)  # what is left is its version taking the alias
        prepared = {str(dataset) for step in runs.steps(store, run_id) if (dataset := step.result.get("dataset_id"))}
        if replayed := runs.find(store, run_id, Replayed):
            prepared.add(replayed.dataset_uri.rpartition("/")[2])
        chosen, config = store.read(start), runs.config_of(store, run_id)
        starts = [str(config.get("train", {}).get("start_from", ""))]
        starts += [str(decode_json(chosen[0], store.uri(start))["version"])] if chosen else []
        method, compared = config.get("method", {}), config.get("tune", {}).get("methods", [])
        rows = [METHODS.get(name) for name in (method.get("name"), *compared)]
        makes_a_base = not OWN_BASE.isdisjoint({method.get("init"), *(row.init for row in rows if row)})
    except (IntegrityError, LookupError, TypeError) as exc:
        raise IntegrityError(
            f"{store.uri(runs.run_key(run_id))} is damaged ({exc}), so it is unknown what the run needs, and nothing "
            "is removed: remove that folder, unless the run still goes on"
        ) from exc
    references = tuple(reference for reference in starts if "@" in reference)
    return _UnderWay(run_id, made, prepared, not prepared, makes_a_base or not config, references)


def _names(made_from: Iterable[Ancestor], kind: str) -> list[str]:
    return [ancestor.name for ancestor in made_from if ancestor.kind == kind]


def _of_versions(objects: Iterable[ObjectInfo], folder: str) -> dict[str, list[ObjectInfo]]:
    grouped = _by_folder((info for info in objects if info.key.startswith(folder)), folder)
    return {version: infos for version, infos in grouped.items() if VERSION_PATTERN.fullmatch(version)}


def _by_folder(objects: Iterable[ObjectInfo], folder: str) -> dict[str, list[ObjectInfo]]:
    grouped: dict[str, list[ObjectInfo]] = {}
    for info in objects:
        name, slash, _ = info.key.removeprefix(folder).partition("/")
        if slash:
            grouped.setdefault(name, []).append(info)
    return grouped


def _newest(objects: Iterable[ObjectInfo]) -> datetime:
    return max(info.last_modified for info in objects)


def _removal(
    kind: Kind, name: str, why: str, objects: Sequence[ObjectInfo], runs_seen: frozenset[str] = frozenset()
) -> Removal:
    keys, size = tuple(info.key for info in objects), sum(info.size for info in objects)
    return Removal(kind, name, why, keys, size, runs_seen=runs_seen)


def _is_needed(store: Store, removal: Removal, name: str, version: str) -> bool:
    """Whether an alias points at the version, or a run has published it again since it was looked at."""
    for info in store.list(events_key(name)):
        if info.key not in removal.log_seen:
            event = event_at(store, name, info.key)
            published = event is not None and event.kind == "published"
            removal.log_seen[info.key] = str(event.body.get("version")) if event and published else ""
    pointers = list_aliases(store, name, pass_over_damaged=False)
    return version in {*removal.log_seen.values(), *(pointer.version for pointer in pointers)}
