"""Versions of an adapter: immutable folders whose id is their content."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from components.records import runs
from components.records.steps import Decision, Evaluation, Part, Record
from components.registry import identity
from components.registry.aliases import PRODUCTION, Pointer, list_aliases, read_alias
from components.registry.cache import Index, changing
from components.registry.event_log import append_event, events, publication, require_published
from components.registry.identity import IDENTITY, VERSION_PATTERN, adapter_key, checked_name, version_key
from components.registry.lineage import Ancestor, Kind, of_record
from components.registry.signing import require_signed
from components.shared.errors import Conflict, IntegrityError, ObjectMissing, UnknownName, UserError
from components.store import folders
from components.store.folders import Manifest
from components.store.store import JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

LINEAGE = "lineage.json"
SHOWN = 8


@dataclass(frozen=True)
class Version:
    """One published version."""

    name: str
    version: str
    uri: str
    created_at: str
    manifest_sha256: str
    run_id: str
    """The run that published it; empty when its lineage names none."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """What its run's evaluation measured; `evaluated` reads it, and without that it is empty."""
    aliases: tuple[str, ...] = ()
    """Aliases that point here, as of when this was read."""
    asked_as: str = field(default="", compare=False)
    """The alias by which it was asked for, whose signature it then needs; empty where its id was given."""

    @property
    def key(self) -> str:
        return version_key(self.name, self.version)


def publish_version(
    store: Store, name: str, files: Mapping[str, bytes | Path], *, lineage: Mapping[str, Any]
) -> Version:
    """Publish an adapter with its lineage; the same weights and adapter config again give the version that exists.

    `files` holds adapter_model.safetensors and adapter_config.json, and beside them what describes the version, such as
    README.md. Of two writers at once, and of one that completes what another left, the lineage that was stored first is
    the version's, and names its run and files: no other file is added, and an empty one takes the place of one that
    only the first writer has and did not store. The same goes for the content of each file that describes it. Raises
    UserError if one of the two is missing, or lineage.json is among the files; Conflict if another content has the same
    id.
    """
    if missing := [path for path in IDENTITY if path not in files]:
        raise UserError(f"cannot publish a version of {name} without {' and '.join(missing)}: add it to the files")
    if LINEAGE in files:
        raise UserError(f"{LINEAGE} is written from the lineage: leave it out of the files of {name}")
    digests = {path: folders.digest_of(files[path]) for path in IDENTITY}
    version = identity.version_id(digests)
    key = version_key(name, version)
    run_id = str(lineage.get("run_id", ""))
    with changing(store, name):
        manifest = folders.find_manifest(store, key)
        if manifest is not None and run_id != manifest.about.get("run_id"):
            # Then it is looked for again: either a garbage collection sees that this run needs the old version, or the
            # run sees that it is gone.
            again = {**publication(version, manifest), "run_id": run_id, "again": True}
            append_event(store, name, "published", again)
            manifest = folders.find_manifest(store, key)
        if manifest is None:
            own = encode_json({**lineage, "files": sorted(files)})
            first = store.claim(f"{key}/{LINEAGE}", own, content_type=JSON)
            claimed = decode_json(first, store.uri(f"{key}/{LINEAGE}"))
            agreed = {path: files.get(path, b"") for path in claimed.get("files", sorted(files))}
            about = {"name": name, "version": version, "run_id": str(claimed.get("run_id", ""))}
            try:
                manifest = folders.publish(store, key, {**agreed, LINEAGE: first}, about=about, identity=IDENTITY)
            except Conflict:  # another run published the same adapter at the same time, with another description
                if (manifest := folders.find_manifest(store, key)) is None:
                    raise
        if any(manifest.files.get(path) != digest for path, digest in digests.items()):
            raise Conflict(f"{store.uri(key)} exists with another content of the same id")
        append_event(store, name, "published", publication(version, manifest), at=manifest.created_at)
    return of_manifest(store, name, version, manifest, list_aliases(store, name))


def list_adapters(store: Store) -> list[str]:
    """Names of the adapters that have a version, an alias or an event."""
    return sorted(store.folders("adapters/"))


def require_adapter(store: Store, name: str) -> None:
    """Require that there is such an adapter. Raises UnknownName if there is none."""
    if next(store.list(adapter_key(name, "")), None) is None:
        raise UnknownName(f"there is no adapter {name!r} in {store.uri('')}: it has {_some(list_adapters(store))}")


class Entry(Part):
    """What is shown of a published version, as an index keeps it; evaluation and decision are reduced."""

    created_at: str
    manifest_sha256: str
    run_id: str
    settled: bool
    """Whether it will not change any more."""
    made_from: tuple[Ancestor, ...] | None
    """None where the lineage is damaged, which an audit reports."""
    evaluation: Evaluation | None
    decision: Decision | None

    def version(self, store: Store, name: str, version: str, aliases: Iterable[Pointer]) -> Version:
        candidate = self.evaluation.model("candidate") if self.evaluation else None
        metrics = candidate.metrics if candidate else {}
        at = tuple(pointer.alias for pointer in aliases if pointer.version == version)
        uri = store.uri(version_key(name, version))
        return Version(name, version, uri, self.created_at, self.manifest_sha256, self.run_id, metrics, at)


def list_versions(store: Store, name: str) -> list[Version]:
    """Every published version with its metrics, newest first, to be shown: what an index says is not verified.

    One whose publication was interrupted is not among them, nor, but for a warning, one whose manifest is damaged.
    """
    aliases = list_aliases(store, name)
    return [entry.version(store, name, version, aliases) for version, entry in entries(store, name).items()]


def entries(store: Store, name: str, index: Index | None = None) -> dict[str, Entry]:
    """What is shown of each published version, by its id, newest first; `index` is the caller's, who keeps it."""

    def is_settled(_version: str, entry: Any) -> bool:
        try:
            return _parsed(entry).settled
        except ValueError:  # another release wrote the index, or somebody else
            return False

    own = index or Index(store, name)
    by_version = own.of("versions", version_ids(store, name), partial(_entry, store, name), is_so=is_settled)
    if index is None:
        own.keep()
    parsed = {version: _parsed(entry) for version, entry in by_version.items()}
    return dict(sorted(parsed.items(), key=lambda item: (item[1].created_at, item[0]), reverse=True))


def _parsed(entry: Any) -> Entry:
    return Entry.model_validate_json(encode_json(entry))


def _entry(store: Store, name: str, version: str) -> dict[str, Any] | None:
    """The `Entry` of a version, as JSON values; None where it is not there whole."""
    try:
        manifest = folders.find_manifest(store, version_key(name, version))
    except IntegrityError as exc:
        logger.warning("%s", exc)
        return None
    if manifest is None:
        return None
    described = of_manifest(store, name, version, manifest)
    evaluation, decision = of_run(store, described)
    lineage = sound_lineage(store, described)
    # After a week, nothing more is measured of a version.
    is_old = manifest.created_at < (datetime.now(UTC) - timedelta(days=7)).isoformat()
    return {
        "created_at": manifest.created_at,
        "manifest_sha256": manifest.sha256,
        "run_id": described.run_id,
        "settled": is_old or decision is not None,
        "made_from": None if lineage is None else [asdict(ancestor) for ancestor in of_record(lineage)],
        "evaluation": evaluation and _reduced(evaluation, {"run_id", "records", "models"}),
        "decision": decision and reduced_decision(decision),
    }


def of_run(store: Store, version: Version) -> tuple[Evaluation | None, Decision | None]:
    """Evaluation and decision of the version's run, as far as they exist and are about this version; to be shown."""
    try:
        measured = evaluation(store, version, to_show=True)
        decision = runs.find(store, version.run_id, Decision, to_show=True) if measured else None
    except IntegrityError:  # an audit reports it
        return None, None
    return measured, decision if decision and decision.version == version.version else None


def _reduced(record: Record, keys: set[str]) -> dict[str, Any]:
    """The record as JSON values, with these keys alone."""
    return dict(json.loads(record.model_dump_json(include=keys, exclude_defaults=True)))


def reduced_decision(decision: Decision) -> dict[str, Any]:
    """What is shown of a decision, as JSON values."""
    body = _reduced(decision, {"decision", "verdict", "adapter", "alias", "run_id", "version", "rules"})
    rules = [{**rule, "text": "", "slices": []} for rule in body.get("rules", []) if "against" in rule]
    return {**body, "reasons": [], "rules": rules}


def newest(store: Store, name: str) -> Version | None:
    """Return the existing version that was published last according to the log; None if there is none."""
    for event in reversed(events(store, name)):
        version = str(event.body.get("version"))
        if event.kind == "published" and (manifest := folders.find_manifest(store, version_key(name, version))):
            return of_manifest(store, name, version, manifest, list_aliases(store, name))
    return None


def resolve(store: Store, reference: str) -> Version:
    """The version that NAME@VERSION, NAME@ALIAS or NAME means.

    A version may be given by its first digits, when they fit only one. NAME alone means its alias production, or the
    newest version when there is none. A whole version id comes before an alias, an alias before first digits. Raises
    UserError if the reference is malformed, or fits several versions; UnknownName if there is no such adapter, version
    or alias; IntegrityError if the alias vouches for another manifest than the version has.
    """
    name, at, wanted = reference.partition("@")
    checked_name(name, "adapter name")
    if at:
        checked_name(wanted, f"alias or version in {reference!r}")
    aliases, is_id = list_aliases(store, name), bool(VERSION_PATTERN.fullmatch(wanted))

    def whole(version: str) -> Version | None:
        manifest = folders.find_manifest(store, version_key(name, version))
        return of_manifest(store, name, version, manifest, aliases) if manifest else None

    if is_id and len(wanted) == 1 + identity.ID_DIGITS and (version := whole(wanted)):
        return version
    # Of the other aliases a damaged one is passed over, and this one must not be.
    alias = wanted or PRODUCTION
    pointer = next((pointer for pointer in aliases if pointer.alias == alias), None) or read_alias(store, name, alias)
    if pointer is not None:
        manifest = folders.read_manifest(store, version_key(name, pointer.version))
        if manifest.sha256 != pointer.manifest_sha256:
            raise IntegrityError(
                f"{name}@{pointer.alias} vouches for {pointer.version} with a manifest of sha256 "
                f"{pointer.manifest_sha256}, but the stored one has {manifest.sha256}"
            )
        return replace(of_manifest(store, name, pointer.version, manifest, aliases), asked_as=pointer.alias)
    ids = version_ids(store, name)
    fitting = [version for version in ids if is_id and version.startswith(wanted)]
    published = [version for version_id in fitting[:SHOWN] if (version := whole(version_id))]
    if len(published) == 1 and len(fitting) <= SHOWN:
        return published[0]
    if published:
        raise UserError(f"{reference} fits {_some(fitting)}: give more digits")
    if not at and (latest := newest(store, name)):
        return latest
    if not ids:
        require_adapter(store, name)
    raise UnknownName(
        f"{reference} is neither an alias nor a version of {name}: its aliases are "
        f"{_some(pointer.alias for pointer in aliases)}; its versions {_some(ids)}"
    )


def evaluated(store: Store, version: Version) -> Version:
    """The version with the metrics that its run's evaluation gave it, where that evaluation is still there."""
    measured = evaluation(store, version, to_show=True)
    candidate = measured.model("candidate") if measured else None
    return replace(version, metrics=candidate.metrics) if candidate else version


def evaluation(store: Store, version: Version, *, to_show: bool = False) -> Evaluation | None:
    """What the version's run measured of it; None where it did not, or the evaluation is gone. Where the registry
    trusts keys, one from before is only `to_show`. Raises IntegrityError if the evaluation is not what it should be."""
    measured = runs.find(store, version.run_id, Evaluation, to_show=to_show) if version.run_id else None
    candidate = measured.model("candidate") if measured else None
    return measured if candidate and candidate.version == version.version else None


def pull_version(store: Store, version: Version, target: Path, *, published_sha256: str = "") -> Manifest:
    """Copy the version to the folder `target`, verified; see `folders.pull` and `signing.require_signed`.

    `published_sha256` is that of the manifest which the caller's own run published: that one needs no signature yet.
    Raises IntegrityError also where its manifest is not the one that the log says was published.
    """
    manifest = identity.require_identity(store, version.key, folders.read_manifest(store, version.key))
    require_published(store, version.name, version.version, manifest)
    if version.manifest_sha256 != published_sha256:
        require_signed(store, version.name, version.version, version.manifest_sha256, alias=version.asked_as)
    return folders.pull(store, version.key, target, manifest_sha256=version.manifest_sha256)


def verify_version(store: Store, version: Version) -> Manifest:
    """Read and check every byte of the version, and what the log says of it; see `identity.verify_whole`."""
    manifest = identity.verify_whole(store, version.key, manifest_sha256=version.manifest_sha256)
    require_published(store, version.name, version.version, manifest)
    return manifest


def read_lineage(store: Store, version: Version) -> dict[str, Any]:
    """The version's lineage record; raises as `read_file`."""
    return read_file(store, version, LINEAGE)


def sound_lineage(store: Store, version: Version) -> dict[str, Any] | None:
    """The version's lineage record; None if it is damaged, which an audit reports."""
    try:
        record: Any = read_lineage(store, version)
    except (IntegrityError, ObjectMissing):
        return None
    return record if isinstance(record, dict) else None


def read_file(store: Store, version: Version, path: str) -> dict[str, Any]:
    """One of the version's JSON files. Raises IntegrityError if it is not the one in the manifest."""
    manifest, body = folders.read_manifest(store, version.key), store.get(f"{version.key}/{path}")
    if manifest.files.get(path) != folders.digest_of(body):
        raise IntegrityError(f"{version.uri}/{path} is not the one that the manifest lists")
    content: dict[str, Any] = decode_json(body, f"{version.uri}/{path}")
    return content


def of_manifest(store: Store, name: str, version: str, manifest: Manifest, aliases: Iterable[Pointer] = ()) -> Version:
    """The version as its manifest describes it."""
    return Version(
        name=name,
        version=version,
        uri=store.uri(version_key(name, version)),
        created_at=manifest.created_at,
        manifest_sha256=manifest.sha256,
        run_id=str(manifest.about.get("run_id", "")),
        aliases=tuple(pointer.alias for pointer in aliases if pointer.version == version),
    )


def version_ids(store: Store, name: str) -> list[str]:
    """Ids of the versions, by their order as text, those included whose publication has not ended."""
    return [version for version in store.folders(adapter_key(name, "versions/")) if VERSION_PATTERN.fullmatch(version)]


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more if shown else "none"


def ancestors(store: Store, version: Version) -> list[tuple[Version, list[Ancestor]]]:
    """The version and the versions that it grew from, nearest first, each with what it was made from.

    A parent that is gone, or is in another registry, is not followed. Raises IntegrityError if the version's own
    lineage is damaged.
    """
    lineage, pending, seen = [], [version], {version.uri}
    while pending:
        child = pending.pop(0)
        made_from = of_record(read_lineage(store, child))
        lineage.append((child, made_from))
        for uri in [ancestor.name for ancestor in made_from if ancestor.kind == "parent"]:
            adapter, _, version_id = uri.removeprefix(store.uri("adapters/")).partition("/versions/")
            if uri.startswith(store.uri("adapters/")) and uri not in seen:
                with contextlib.suppress(ObjectMissing):
                    pending.append(resolve(store, f"{adapter}@{version_id}"))
            seen.add(uri)
    return lineage


def descendants(store: Store, name: str, terms: Mapping[Kind, str]) -> list[Version]:
    """Versions of the adapter, newest first, whose lineage matches all terms.

    A base, commit, config or dataset may be given by its beginning; a source or parent must be given in full.
    """

    def fits(ancestor: Ancestor, kind: Kind, wanted: str) -> bool:
        is_whole = kind in ("source", "parent")
        return ancestor.kind == kind and (ancestor.name == wanted if is_whole else ancestor.name.startswith(wanted))

    aliases = list_aliases(store, name)
    return [
        entry.version(store, name, version, aliases)
        for version, entry in entries(store, name).items()
        if entry.made_from is not None
        and all(any(fits(ancestor, *term) for ancestor in entry.made_from) for term in terms.items())
    ]


def made_from(store: Store, name: str) -> dict[str, tuple[Ancestor, ...]]:
    """The ancestors of each version of the adapter, by its id; versions with unreadable lineage are left out."""
    shown = entries(store, name).items()
    return {version: entry.made_from for version, entry in shown if entry.made_from is not None}


def tree(lineage: list[tuple[Version, list[Ancestor]]]) -> Iterator[str]:
    """Yield the lines of the ancestry drawn as a tree."""
    for depth, (version, made_from) in enumerate(lineage):
        yield f"{'    ' * depth}{version.name} {version.version}"
        rows = [ancestor for ancestor in made_from if ancestor.kind != "parent"]
        for position, ancestor in enumerate(rows):
            corner = "└──" if position == len(rows) - 1 and depth == len(lineage) - 1 else "├──"
            yield f"{'    ' * depth}{corner} {ancestor.kind:<8}{ancestor.name}"
