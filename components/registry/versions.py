"""Versions of an adapter: immutable folders whose id is their content."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.records import runs
from components.records.steps import Evaluation
from components.registry.aliases import PRODUCTION, Pointer, list_aliases, read_alias
from components.registry.cache import changing, remembered
from components.registry.event_log import append_event, events, publication, require_published
from components.registry.identity import (
    ID_DIGITS,
    IDENTITY,
    VERSION_PATTERN,
    adapter_key,
    checked_name,
    require_identity,
    verify_whole,
    version_id,
    version_key,
)
from components.registry.signing import require_signed
from components.shared.errors import Conflict, IntegrityError, UnknownName, UserError
from components.store import folders
from components.store.folders import Manifest
from components.store.store import JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

LINEAGE = "lineage.json"
DESCRIBED = {"created_at", "manifest_sha256", "run_id"}
SHOWN = 8
FILES = "files"
"""Key of the lineage: the version's files, beside lineage and manifest."""


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


def publish_version(
    store: Store, name: str, files: Mapping[str, bytes | Path], *, lineage: Mapping[str, Any]
) -> Version:
    """Publish an adapter with its lineage; the same weights and adapter config again give the version that exists.

    `files` holds adapter_model.safetensors and adapter_config.json, and beside them what describes the version, such as
    README.md. Of two writers at once, and of one that completes what another left, the lineage that was stored first is
    the version's, and names its run and files: no other file is added, and an empty one takes the place of one that
    only the first writer has and did not store. The same goes for the content of each file that describes it.

    Raises:
        UserError: one of the two is missing, or lineage.json is among the files.
        Conflict: another content has the same id.
    """
    if missing := [path for path in IDENTITY if path not in files]:
        raise UserError(f"cannot publish a version of {name} without {' and '.join(missing)}: add it to the files")
    if LINEAGE in files:
        raise UserError(f"{LINEAGE} is written from the lineage: leave it out of the files of {name}")
    digests = {path: folders.digest_of(files[path]) for path in IDENTITY}
    version = version_id(digests)
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
            own = encode_json({**lineage, FILES: sorted(files)})
            first = store.claim(f"{key}/{LINEAGE}", own, content_type=JSON)
            claimed = decode_json(first, store.uri(f"{key}/{LINEAGE}"))
            agreed = {path: files.get(path, b"") for path in claimed.get(FILES, sorted(files))}
            about = {"name": name, "version": version, "run_id": str(claimed.get("run_id", ""))}
            try:
                manifest = folders.publish(store, key, {**agreed, LINEAGE: first}, about=about, identity=IDENTITY)
            except Conflict:  # another run published the same adapter at the same time, with another description
                manifest = folders.find_manifest(store, key)
                if manifest is None:
                    raise
        if any(manifest.files.get(path) != digest for path, digest in digests.items()):
            raise Conflict(f"{store.uri(key)} exists with another content of the same id")
        append_event(store, name, "published", publication(version, manifest), at=manifest.created_at)
    return _version(store, name, version, manifest, list_aliases(store, name))


def list_adapters(store: Store) -> list[str]:
    """Names of the adapters that have a version, an alias or an event."""
    return sorted(store.folders("adapters/"))


def require_adapter(store: Store, name: str) -> None:
    """Require that there is such an adapter.

    Raises:
        UnknownName: there is none.
    """
    if next(store.list(adapter_key(name, "")), None) is None:
        raise UnknownName(f"there is no adapter {name!r} in {store.uri('')}: it has {_some(list_adapters(store))}")


def list_versions(store: Store, name: str) -> list[Version]:
    """Every published version, newest first, to be shown: what an index says of them is not verified.

    One whose publication was interrupted is not among them, nor, but for a warning, one whose manifest is damaged.
    """
    known = remembered(
        store,
        name,
        "versions",
        version_ids(store, name),
        lambda version: described(store, name, version),
        is_so=lambda _version, entry: _is_of_texts(entry) and entry.keys() == DESCRIBED,
    )
    aliases = list_aliases(store, name)
    found = [
        Version(
            name=name,
            version=version,
            uri=store.uri(version_key(name, version)),
            aliases=tuple(pointer.alias for pointer in aliases if pointer.version == version),
            **entry,
        )
        for version, entry in known.items()
    ]
    return sorted(found, key=lambda version: (version.created_at, version.version), reverse=True)


def newest(store: Store, name: str) -> Version | None:
    """Return the existing version that was published last according to the log; None if there is none."""
    for event in reversed(events(store, name)):
        version = str(event.body.get("version"))
        if event.kind == "published" and (manifest := folders.find_manifest(store, version_key(name, version))):
            return _version(store, name, version, manifest, list_aliases(store, name))
    return None


def resolve(store: Store, reference: str) -> Version:
    """The version that NAME@VERSION, NAME@ALIAS or NAME means.

    A version may be given by its first digits, when they fit only one. NAME alone means its alias production, or the
    newest version when there is none. A whole version id comes before an alias, an alias before first digits.

    Raises:
        UserError: the reference is malformed, or fits several versions.
        UnknownName: there is no such adapter, version or alias.
        IntegrityError: the alias vouches for another manifest than the version has.
    """
    name, at, wanted = reference.partition("@")
    checked_name(name, "adapter name")
    if at:
        checked_name(wanted, f"alias or version in {reference!r}")
    aliases = list_aliases(store, name)
    if len(wanted) == 1 + ID_DIGITS and VERSION_PATTERN.fullmatch(wanted):
        manifest = folders.find_manifest(store, version_key(name, wanted))
        if manifest is not None:
            return _version(store, name, wanted, manifest, aliases)
    # Of the other aliases a damaged one is passed over, and this one must not be.
    alias = wanted or PRODUCTION
    pointer = next((each for each in aliases if each.alias == alias), None) or read_alias(store, name, alias)
    if pointer is not None:
        return _pointed_at(store, name, pointer, aliases)
    ids = version_ids(store, name)
    fitting = [version for version in ids if version.startswith(wanted)] if VERSION_PATTERN.fullmatch(wanted) else []
    whole = [
        (version, found)
        for version in fitting[:SHOWN]
        if (found := folders.find_manifest(store, version_key(name, version)))
    ]
    if len(whole) == 1 and len(fitting) <= SHOWN:
        return _version(store, name, *whole[0], aliases)
    if whole:
        raise UserError(f"{reference} fits {_some(fitting)}: give more digits")
    latest = None if at else newest(store, name)
    if latest:
        return latest
    if not ids:
        require_adapter(store, name)
    raise UnknownName(
        f"{reference} is neither an alias nor a version of {name}: its aliases are "
        f"{_some(pointer.alias for pointer in aliases)}; its versions {_some(ids)}"
    )


def evaluated(store: Store, version: Version) -> Version:
    """The version with the metrics that its run's evaluation gave it, where that evaluation is still there.

    A version is published before it is compared, and never rewritten: the comparison lies with the run.
    """
    found = evaluation(store, version, to_show=True)
    candidate = found.model("candidate") if found else None
    return replace(version, metrics=candidate.metrics) if candidate else version


def evaluation(store: Store, version: Version, *, to_show: bool = False) -> Evaluation | None:
    """What the version's run measured of it; None where it did not, or the evaluation is gone. Where the registry
    trusts keys, one from before is only `to_show`.

    Raises:
        IntegrityError: the evaluation is not what it should be.
    """
    found = runs.find(store, version.run_id, Evaluation, to_show=to_show) if version.run_id else None
    candidate = found.model("candidate") if found else None
    return found if candidate and candidate.version == version.version else None


def all_evaluated(store: Store, found: Sequence[Version]) -> list[Version]:
    """Each version, all of one adapter, as `evaluated` gives it; an evaluation that is remembered is not read again."""
    if not found:
        return []
    by_id = {version.version: version for version in found}
    metrics = remembered(
        store,
        found[0].name,
        "metrics",
        by_id,
        lambda version: dict(evaluated(store, by_id[version]).metrics) or None,
        is_so=lambda _version, entry: isinstance(entry, dict),
    )
    return [replace(version, metrics=metrics.get(version.version, {})) for version in found]


def pull_version(store: Store, version: Version, target: Path, *, published_sha256: str = "") -> Manifest:
    """Copy the version to the folder `target`, verified; see `folders.pull` and `signing.require_signed`.

    `published_sha256` is that of the manifest which the caller's own run published: that one needs no signature yet.

    Raises:
        IntegrityError: also where its manifest is not the one that the log says was published.
    """
    key = version_key(version.name, version.version)
    manifest = require_identity(store, key, folders.read_manifest(store, key))
    require_published(store, version.name, version.version, manifest)
    if version.manifest_sha256 != published_sha256:
        require_signed(store, version.name, version.version, version.manifest_sha256, alias=version.asked_as)
    return folders.pull(store, key, target, manifest_sha256=version.manifest_sha256)


def verify_version(store: Store, version: Version) -> Manifest:
    """Read and check every byte of the version, and what the log says of it; see `identity.verify_whole`."""
    key = version_key(version.name, version.version)
    manifest = verify_whole(store, key, manifest_sha256=version.manifest_sha256)
    require_published(store, version.name, version.version, manifest)
    return manifest


def read_lineage(store: Store, version: Version) -> dict[str, Any]:
    """The version's lineage record; raises as `read_file`."""
    return read_file(store, version, LINEAGE)


def lineage_of(store: Store, name: str, version: str) -> dict[str, Any]:
    """The lineage record of the version with this id; raises as `read_file`."""
    return _read_file(store, version_key(name, version), LINEAGE)


def read_file(store: Store, version: Version, path: str) -> dict[str, Any]:
    """One of the version's JSON files.

    Raises:
        IntegrityError: it is not the one in the manifest.
    """
    return _read_file(store, version_key(version.name, version.version), path)


def _read_file(store: Store, key: str, path: str) -> dict[str, Any]:
    manifest = folders.read_manifest(store, key)
    body = store.get(f"{key}/{path}")
    if manifest.files.get(path) != folders.digest_of(body):
        raise IntegrityError(f"{store.uri(key)}/{path} is not the one that the manifest lists")
    found: dict[str, Any] = decode_json(body, store.uri(f"{key}/{path}"))
    return found


def _pointed_at(store: Store, name: str, pointer: Pointer, aliases: list[Pointer]) -> Version:
    manifest = folders.read_manifest(store, version_key(name, pointer.version))
    if manifest.sha256 != pointer.manifest_sha256:
        raise IntegrityError(
            f"{name}@{pointer.alias} vouches for {pointer.version} with a manifest of sha256 "
            f"{pointer.manifest_sha256}, but the stored one has {manifest.sha256}"
        )
    return replace(_version(store, name, pointer.version, manifest, aliases), asked_as=pointer.alias)


def _version(store: Store, name: str, version: str, manifest: Manifest, aliases: Iterable[Pointer]) -> Version:
    return Version(
        name=name,
        version=version,
        uri=store.uri(version_key(name, version)),
        created_at=manifest.created_at,
        manifest_sha256=manifest.sha256,
        run_id=str(manifest.about.get("run_id", "")),
        aliases=tuple(pointer.alias for pointer in aliases if pointer.version == version),
    )


def described(store: Store, name: str, version: str) -> dict[str, str] | None:
    """What a list says of a version beside its id; a manifest never changes. None where it is not there whole."""
    try:
        manifest = folders.find_manifest(store, version_key(name, version))
    except IntegrityError as exc:
        logger.warning("%s", exc)
        return None
    if manifest is None:
        return None
    run_id = str(manifest.about.get("run_id", ""))
    return {"created_at": manifest.created_at, "manifest_sha256": manifest.sha256, "run_id": run_id}


def _is_of_texts(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def version_ids(store: Store, name: str) -> list[str]:
    """Ids of the versions, by their order as text, those included whose publication has not ended."""
    return [version for version in store.folders(adapter_key(name, "versions/")) if VERSION_PATTERN.fullmatch(version)]


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more if shown else "none"
