"""The files of an adapter that a run's report and the registry's pages read.

Only new ones are read from the store: adapters/<name>/index/page.json.gz has the rest; see `index`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from components.records import runs
from components.records.steps import Decision, Evaluation, Record
from components.registry import event_log, versions
from components.registry.aliases import aliases_key, list_aliases
from components.registry.cache import Index, mark_of
from components.registry.identity import adapter_key, version_key
from components.registry.versions import Version
from components.report.html import parse_moment
from components.report.published import Published
from components.shared.errors import IntegrityError, ObjectMissing
from components.store.store import ReadOnce, encode_json

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.registry.event_log import Event
    from components.store.store import Store

R = TypeVar("R", bound=Record)
DIFFERS = ("config", "dataset", "base", "environment")
"""Parts of the lineage for which the pages show changes between versions."""
LINEAGE = "lineage "
"""Prefix of the index keys for the compared parts of lineages; a version's id follows."""
DECISION = "decision "
"""Prefix of the index keys for decisions; a run's id follows."""
SETTLED = timedelta(days=7)
"""Age after which nothing more is measured of a version."""
OF_THE_START = ("start_from", "start_share")
"""Keys of section `train` that say where a training starts, and what share of it stays."""


class AdapterFiles:
    """An adapter at the time of asking; each of its objects is read once."""

    def __init__(self, store: "Store", name: str) -> None:
        self.store, self.name = ReadOnce(store), name
        self._index = Index(self.store, name, "page")
        self.mark = mark_of(self.store, name)
        """The adapter's mark before anything else of it was read; None while others change it."""

    def keep(self) -> None:
        """Write the index of what was asked for, if some of it is new."""
        self._index.keep()

    @cached_property
    def aliases(self) -> "list[Pointer]":
        """The adapter's aliases, by name; a damaged one is left out with a warning."""
        folders = aliases_key(self.name), event_log.events_key(self.name)
        self.store.list_first(adapter_key(self.name, ""), *folders)
        return list_aliases(self.store, self.name)

    @cached_property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """The index entry of each version, the newest first."""
        found = self._index.of(self._ids, self._entry, is_so=_is_settled)
        return dict(sorted(found.items(), key=lambda item: (item[1]["created_at"], item[0]), reverse=True))

    @cached_property
    def log(self) -> "list[Event]":
        """The events, oldest first."""
        return event_log.events(self.store, self.name, index=self._index)

    def published(self, version: str) -> Published:
        """Return one of the versions in the index."""
        entry = self.entries[version]
        uri = self.store.uri(version_key(self.name, version))
        found = Version(
            name=self.name,
            version=version,
            uri=uri,
            created_at=entry["created_at"],
            manifest_sha256=entry["manifest_sha256"],
            run_id=entry["run_id"],
            aliases=tuple(pointer.alias for pointer in self.aliases if pointer.version == version),
        )
        try:
            return Published(found, _parsed(Evaluation, entry, uri), _parsed(Decision, entry, uri))
        except IntegrityError:  # another release wrote the index
            return self.read_anew(found)

    def read_anew(self, version: Version) -> Published:
        """Read a version without the index."""
        return Published(version, *_of_run(self.store, version.run_id, version.version))

    def changes(self, before: str | None, after: str) -> list[tuple[str, str, str]]:
        """Return the changes of the lineage as (path, before, after); empty if one of the two cannot be read."""
        # The index keeps the production version's lineage, to compare it with the next version's.
        keys = {f"{LINEAGE}{version}": version for version in (before, after) if version in self._ids}
        compared = self._index.of(keys, lambda key: self._of_lineage(keys[key], _compared), is_so=_are_texts)
        found = {keys[key]: paths for key, paths in compared.items()}
        if before is None or not {before, after} <= found.keys():
            return []
        old, new = found[before], found[after]
        return [
            (path, old.get(path, "-"), new.get(path, "-"))
            for path in sorted(old.keys() | new.keys())
            if old.get(path) != new.get(path)
        ]

    def decisions(self, run_ids: Iterable[str]) -> list[Decision]:
        """Return the decisions of these runs that are kept, in the runs' order, reduced to what the pages show.

        Raises:
            IntegrityError: a decision is damaged.
        """
        return self._decisions(run_ids, lambda run_id: runs.find(self.store, run_id, Decision, to_show=True))

    def sound_decisions(self, run_ids: Iterable[str]) -> list[Decision]:
        """Return the same as `decisions`, without damaged ones, which an audit reports."""
        return self._decisions(run_ids, lambda run_id: runs.decision_of(self.store, run_id, to_show=True))

    def _decisions(self, run_ids: Iterable[str], find: Callable[[str], Decision | None]) -> list[Decision]:
        of_versions = {each["run_id"]: each[Decision.FILE] for each in self.entries.values()}

        def read(key: str) -> Any | None:
            run_id = key.removeprefix(DECISION)
            return of_versions.get(run_id) or _shown(find(run_id))

        keys = [f"{DECISION}{run_id}" for run_id in run_ids]
        found = self._index.of(keys, read, is_so=lambda _key, each: isinstance(each, dict))
        return [each for key, body in found.items() if (each := self._parsed(key.removeprefix(DECISION), body, find))]

    def _parsed(self, run_id: str, body: Mapping[str, Any], find: Callable[[str], Decision | None]) -> Decision | None:
        try:
            return Decision.from_json(encode_json(body), self.store.uri(runs.run_key(run_id, Decision.FILE)))
        except IntegrityError:  # another release wrote the index
            return find(run_id)

    @cached_property
    def _ids(self) -> list[str]:
        return versions.version_ids(self.store, self.name)

    def _of_lineage(self, version: str, part: Callable[[Mapping[str, Any]], dict[str, str]]) -> dict[str, str] | None:
        """Apply `part` to the version's lineage; None if the lineage is damaged, which an audit reports."""
        try:
            lineage: Any = versions.lineage_of(self.store, self.name, version)
        except (IntegrityError, ObjectMissing):
            return None
        return part(lineage) if isinstance(lineage, dict) else None

    def _entry(self, version: str) -> dict[str, Any] | None:
        """Make the index entry of a version; evaluation and decision are reduced to what is shown."""
        described = versions.described(self.store, self.name, version)
        if described is None:
            return None
        evaluation, decision = _of_run(self.store, described["run_id"], version)
        created = parse_moment(described["created_at"])
        is_old = created is not None and datetime.now(UTC) - created > SETTLED
        return {
            **described,
            "settled": is_old or decision is not None,
            "trained": self._of_lineage(version, trained),
            Evaluation.FILE: evaluation and _small(evaluation, {"run_id", "records", "models", "paired"}),
            Decision.FILE: _shown(decision),
        }


def _parsed(kind: type[R], entry: Mapping[str, Any], uri: str) -> R | None:
    part = entry[kind.FILE]
    return kind.from_json(encode_json(part), uri) if part else None


def _shown(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    body = _small(decision, {"decision", "verdict", "adapter", "alias", "run_id", "version", "rules"})
    rules = [{**rule, "text": "", "slices": []} for rule in body.get("rules", []) if "against" in rule]
    return {**body, "reasons": [], "rules": rules}


def _small(record: Record, keys: set[str]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(record.model_dump_json(include=keys, exclude_defaults=True))
    return body


def _is_settled(_version: str, found: Any) -> bool:
    """Whether it is an index entry of a version, and will not change any more."""
    return (
        isinstance(found, dict)
        and found.keys() == {*versions.DESCRIBED, "settled", "trained", Evaluation.FILE, Decision.FILE}
        and all(isinstance(found[key], str) for key in versions.DESCRIBED)
        and found["settled"] is True
    )


def _are_texts(_key: str, found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def _of_run(store: "Store", run_id: str, version: str) -> tuple[Evaluation | None, Decision | None]:
    """Return a run's evaluation and decision, as far as they exist and are about this version."""
    try:
        found = runs.find(store, run_id, Evaluation, to_show=True) if run_id else None
        candidate = found.model("candidate") if found else None
        if candidate is None or candidate.version != version:
            return None, None
        decision = runs.find(store, run_id, Decision, to_show=True)
    except IntegrityError:  # an audit reports it; the page shows what there is
        return None, None
    return found, decision if decision and decision.version == version else None


def trained(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return the dataset, the parent version (empty if none) and the sha256 of the config without its start."""
    config, parents = _section(lineage, "config"), lineage.get("parents")
    train = {key: value for key, value in _section(config, "train").items() if key not in OF_THE_START}
    return {
        "dataset": str(_section(lineage, "dataset").get("dataset_id", "")),
        "parent": str(next(filter(None, parents), "")) if isinstance(parents, list) else "",
        "config": hashlib.sha256(json.dumps({**config, "train": train}, sort_keys=True).encode()).hexdigest(),
    }


def _section(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a section; empty if it is not a mapping, since anyone who may publish may write any lineage."""
    found = of.get(key)
    return found if isinstance(found, Mapping) else {}


def _compared(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return what the pages compare of a lineage, by path."""
    return {path: text for part in DIFFERS for path, text in _leaves(lineage.get(part), part)}


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif value is not None:
        yield path, str(value)
