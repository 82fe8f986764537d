"""Lineage in both directions: what a version was made from, and which versions were made from a thing."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from components.registry import versions
from components.registry.identity import version_key
from components.registry.index import remembered
from components.registry.versions import LINEAGE, Version, read_lineage
from components.shared.errors import IntegrityError, ObjectMissing, UserError
from components.store.store import Store

logger = logging.getLogger(__name__)

Kind = Literal["dataset", "source", "base", "commit", "config", "parent"]

BASE_FIELDS = ("stands_on", "nf4_copy")
"""Fields of a lineage's recipe that name a base: the one that the adapter was trained on, and its copy in NF4, which is
no longer made."""


@dataclass(frozen=True)
class Ancestor:
    """Something that a version was made from."""

    kind: Kind
    name: str
    """The name, by the kind: a dataset's id, a source's name, a base as the config names it or the URI of one
    that Fineloop made, a commit, a config's sha256, a version's URI."""


def parse_terms(terms: Iterable[str]) -> dict[Kind, str]:
    """Parse KIND=NAME terms, each kind once, for `descendants`.

    Raises:
        UserError: a term is not of that form, or of an unknown kind.
    """
    found: dict[Kind, str] = {}
    for term in terms:
        kind, _, name = term.partition("=")
        if kind not in get_args(Kind) or not name:
            raise UserError(f"--of {term}: write KIND=NAME, where KIND is one of {', '.join(get_args(Kind))}")
        found[cast(Kind, kind)] = name
    return found


def of_record(lineage: Mapping[str, Any]) -> list[Ancestor]:
    """The ancestors that one lineage record names; a missing key names none."""

    def at(*path: str) -> Any:
        found: Any = lineage
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    configured = at("config", "data", "source") or []
    bases = dict.fromkeys([at("base", "reference"), *(at("recipe", field) for field in BASE_FIELDS)])
    sources = dict.fromkeys([*([configured] if isinstance(configured, str) else configured), *(at("sources") or ())])
    named: list[tuple[Kind, Any]] = [
        ("dataset", at("dataset", "dataset_id")),
        *[("source", source) for source in sources],
        *[("base", base) for base in bases],
        ("commit", at("environment", "code", "commit")),
        ("config", at("config_sha256")),
        *[("parent", parent) for parent in at("parents") or []],
    ]
    return [Ancestor(kind, str(name)) for kind, name in named if name]


def ancestors(store: Store, version: Version) -> list[tuple[Version, list[Ancestor]]]:
    """The version and the versions that it grew from, nearest first, each with what it was made from.

    A parent that is gone, or is in another registry, is not followed.

    Raises:
        IntegrityError: the version's own lineage is damaged.
    """
    found, pending, seen = [], [version], {version.uri}
    while pending:
        each = pending.pop(0)
        made_from = of_record(read_lineage(store, each))
        found.append((each, made_from))
        for parent in [ancestor.name for ancestor in made_from if ancestor.kind == "parent"]:
            known = None if parent in seen else _parent(store, parent)
            seen.add(parent)
            pending += [known] if known else []
    return found


def descendants(store: Store, name: str, terms: Mapping[Kind, str]) -> list[Version]:
    """Versions of the adapter, newest first, whose lineage matches all terms.

    A base, commit, config or dataset may be given by its beginning; a source or parent must be given in full.
    """

    def names(made_from: Iterable[Ancestor]) -> bool:
        return all(any(_fits(each, kind, wanted) for each in made_from) for kind, wanted in terms.items())

    known = made_from(store, name)
    return [version for version in versions.list_versions(store, name) if names(known.get(version.version, []))]


def made_from(store: Store, name: str) -> dict[str, list[Ancestor]]:
    """The ancestors of each version of the adapter, by its id; versions with unreadable lineage are left out."""
    ids = versions.version_ids(store, name)
    known = remembered(store, name, "ancestors", ids, lambda version: _entry(store, name, version), is_so=_is_entry)
    return {version: [Ancestor(*each) for each in entry] for version, entry in known.items()}


def _fits(ancestor: Ancestor, kind: Kind, wanted: str) -> bool:
    if kind in ("source", "parent"):
        return ancestor == Ancestor(kind, wanted)
    return ancestor.kind == kind and ancestor.name.startswith(wanted)


def _entry(store: Store, name: str, version: str) -> list[tuple[Kind, str]] | None:
    try:
        lineage = store.get_json(f"{version_key(name, version)}/{LINEAGE}")
    except (ObjectMissing, IntegrityError) as exc:
        logger.debug("%s", exc)
        return None
    return [(each.kind, each.name) for each in of_record(lineage if isinstance(lineage, dict) else {})]


def _is_entry(_version: str, entry: Any) -> bool:
    pairs = entry if isinstance(entry, list) else [None]
    return all(
        isinstance(each, list) and len(each) == 2 and all(isinstance(word, str) for word in each) for each in pairs
    )


def _parent(store: Store, uri: str) -> Version | None:
    adapter, _, version = uri.removeprefix(store.uri("adapters/")).partition("/versions/")
    try:
        return versions.resolve(store, f"{adapter}@{version}") if uri.startswith(store.uri("adapters/")) else None
    except ObjectMissing:
        return None


def tree(found: list[tuple[Version, list[Ancestor]]]) -> Iterator[str]:
    """Yield the lines of the ancestry drawn as a tree."""
    for depth, (version, made_from) in enumerate(found):
        yield f"{'    ' * depth}{version.name} {version.version}"
        rows = [ancestor for ancestor in made_from if ancestor.kind != "parent"]
        for position, ancestor in enumerate(rows):
            corner = "└──" if position == len(rows) - 1 and depth == len(found) - 1 else "├──"
            yield f"{'    ' * depth}{corner} {ancestor.kind:<8}{ancestor.name}"
