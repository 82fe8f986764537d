"""An adapter as one listing of it shows it: its versions with what they need, its log, its aliases; and all adapters.

What is small is read through `documents`: of an adapter that has not changed, that is two requests in all.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property

from pydantic import TypeAdapter, ValidationError

from components.records import pages
from components.registry import signing, versions
from components.registry.aliases import aliases_key, parse_aliases
from components.registry.ancestry import Ancestor, of_record
from components.registry.documents import documents
from components.registry.event import Event
from components.registry.event_log import event_at, events_key, parse_log
from components.registry.identity import VERSION_PATTERN
from components.registry.index import READS_AT_ONCE
from components.registry.names import adapter_key, version_key
from components.registry.versions import LINEAGE, Version
from components.shared.errors import IntegrityError
from components.store import folders
from components.store.folders import MANIFEST
from components.store.store import ObjectInfo, Store, decode_json


@dataclass(frozen=True)
class Summary:
    """What the list of all adapters says of one."""

    newest: str | None
    """The version that was published last."""
    versions: int
    aliases: dict[str, str]
    """Version by alias."""
    mark: str
    """The adapter's mark before it was read; see `records.pages`."""


_SUMMARY = TypeAdapter(Summary)


@dataclass(frozen=True, kw_only=True)
class Needing(Version):
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
        """List it."""
        return cls(store, name, list(store.list(adapter_key(name, ""))))

    @cached_property
    def by_version(self) -> dict[str, list[ObjectInfo]]:
        """The objects of each version, those included whose publication has not ended."""
        return self._grouped(version_key(self.name, ""))

    @cached_property
    def whole(self) -> set[str]:
        """The versions whose publication has ended."""
        keys = {info.key for info in self.objects}
        return {version for version in self.by_version if _key(self.name, version, MANIFEST) in keys}

    def published(self) -> list[Needing]:
        """Every version, newest first.

        Raises:
            IntegrityError: a manifest or a lineage is damaged.
        """
        found = [each for version in self.by_version if (each := self._published(version))]
        return sorted(found, key=lambda each: (each.created_at, each.version), reverse=True)

    def log(self) -> list[Event]:
        """The events, oldest first.

        Raises:
            IntegrityError: what lies there is none.
        """
        log, junk = parse_log(self.store, self.name, self._within(events_key(self.name)))
        if junk:
            key, why = next(iter(junk.items()))
            raise IntegrityError(
                f"{self.store.uri(key)} is no event ({why}), so it is unknown what held an alias, "
                "and nothing is removed: remove the object, if `fineloop adapters audit` says no more of the log"
            )
        return log

    def holders(self) -> dict[str, str]:
        """Version by alias.

        Raises:
            IntegrityError: an alias is damaged.
        """
        found = ((key, body, "") for key, body in self._within(aliases_key(self.name)))
        pointers = parse_aliases(self.store, self.name, found, pass_over_damaged=False)
        return {each.alias: each.version for each in pointers}

    @cached_property
    def _bodies(self) -> dict[str, bytes]:
        folders_of = [events_key(self.name), aliases_key(self.name)]
        folders_of += [signing.signatures_key(self.name)] if self.store.trusted_keys else []
        of_versions = {_key(self.name, version, file) for version in self.by_version for file in (MANIFEST, LINEAGE)}
        deciding = [info for info in self.objects if info.key in of_versions or info.key.startswith(tuple(folders_of))]
        return documents(self.store, self.name, deciding)

    @cached_property
    def _signatures(self) -> dict[str, list[ObjectInfo]]:
        return self._grouped(signing.signatures_key(self.name))

    def _published(self, version: str) -> Needing | None:
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
        return Needing(
            name=self.name,
            version=version,
            uri=uri,
            created_at=manifest.created_at,
            manifest_sha256=manifest.sha256,
            run_id=str(manifest.about.get("run_id", "")),
            made_from=tuple(of_record(decode_json(lineage, uri))),
            is_revoked=bool(store.trusted_keys) and self._is_revoked(version, manifest.sha256),
        )

    def _is_revoked(self, version: str, manifest_sha256: str) -> bool:
        objects, trusted = self._signatures.get(version, []), self.store.trusted_keys
        said = signing.said(
            self.store, self.name, version, manifest_sha256, trusted, objects=objects, bodies=self._bodies
        )
        return bool(said.revoked_by)

    def _content(self, key: str) -> bytes | None:
        """Read by itself where the listing lacks it, whose pages are not all of one moment."""
        if key in self._bodies:
            return self._bodies[key]
        found = self.store.read(key)
        return found[0] if found else None

    def _within(self, folder: str) -> Iterator[tuple[str, bytes]]:
        for info in self.objects:
            if info.key.startswith(folder) and (body := self._content(info.key)) is not None:
                yield info.key, body

    def _grouped(self, folder: str) -> dict[str, list[ObjectInfo]]:
        """The objects of each version's folder in this one."""
        found: dict[str, list[ObjectInfo]] = {}
        for info in self.objects:
            version, slash, _ = info.key.removeprefix(folder).partition("/")
            if slash and info.key.startswith(folder) and VERSION_PATTERN.fullmatch(version):
                found.setdefault(version, []).append(info)
        return found


def _key(name: str, version: str, file: str) -> str:
    return f"{version_key(name, version)}/{file}"


def all_adapters(store: Store) -> dict[str, Summary]:
    """Every adapter by its name, to be shown. Read are those that have changed since the list of them was written."""
    # The marks first, then the list, then the adapters: what changes meanwhile has another mark the next time.
    marks = {info.key.removeprefix(pages.CHANGED): info for info in store.list(pages.CHANGED)}
    was, now = pages.read_entries(store), datetime.now(UTC)
    entries, _ = was

    def one(name: str) -> Summary:
        mark = marks[name].etag if name in marks else ""
        try:
            known = _SUMMARY.validate_python(entries.get(name, {}).get(pages.LISTING))
        except ValidationError:
            return summary(store, name, mark)
        return known if known.mark == mark else summary(store, name, mark)

    names = versions.list_adapters(store)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    settled = {name: asdict(each) for name, each in found.items() if pages.is_settled(marks.get(name), now)}
    if any(entries.get(name, {}).get(pages.LISTING) != each for name, each in settled.items()):
        changed = {name: {pages.LISTING: each} for name, each in settled.items()}
        pages.write_entries(store, lambda old: old | {n: old.get(n, {}) | new for n, new in changed.items()}, was)
    return found


def summary(store: Store, name: str, mark: str) -> Summary:
    """Read one adapter: a listing, its aliases, and its events from the newest back to a publication."""
    listing = Listing.of(store, name)
    keys = [info.key for info in listing.objects]
    log = sorted((key for key in keys if key.startswith(events_key(name))), reverse=True)
    bodies = (event.body for key in log if (event := event_at(store, name, key)) and event.kind == "published")
    first = (body for body in bodies if not body.get("again"))  # not by a run that trained the same
    newest = next((version for body in first if (version := body.get("version")) in listing.whole), None)
    held = ((key, *found) for key in keys if key.startswith(aliases_key(name)) and (found := store.read(key)))
    aliases = {each.alias: each.version for each in parse_aliases(store, name, held)}
    return Summary(newest, len(listing.whole), aliases, mark)
