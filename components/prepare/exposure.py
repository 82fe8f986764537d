"""Which datasets hold a record, which versions were trained on one of them, and which runs keep its text."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

from components.prepare.dataset import REJECTS, SplitName
from components.records import runs
from components.registry import signing, versions
from components.registry.aliases import list_aliases
from components.registry.cache import READS_AT_ONCE
from components.registry.collect import DATASETS, RUNS
from components.registry.identity import version_key
from components.registry.lineage import Ancestor, made_from
from components.shared.errors import ObjectMissing
from components.store.store import ObjectFile, ObjectInfo, Store

logger = logging.getLogger(__name__)

Part = Literal["train", "eval", "replay", "rejects"]


@dataclass(frozen=True)
class Holder:
    """A dataset that holds some of the records."""

    dataset_id: str
    uri: str
    parts: tuple[Part, ...]
    """`rejects` keeps the raw text of a row that was never trained on."""
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Exposed:
    """A version whose weights come from a dataset that holds some of the records."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    dataset_id: str
    """The dataset that it was trained on; empty where only an ancestor was trained on one, or it is unknown."""
    why: Literal["dataset", "parent", "unknown"]
    """`unknown` where its lineage cannot be read."""
    revoked: bool


@dataclass(frozen=True)
class Exposure:
    """The datasets, versions and runs that saw the records."""

    datasets: tuple[Holder, ...]
    versions: tuple[Exposed, ...]
    runs: tuple[str, ...]
    """Ids of runs whose evaluated records hold the text of any of them."""
    unread: tuple[str, ...]
    """URIs of files that cannot be read, or have no ids: whether they hold any of the records is unknown."""


def find(store: Store, record_ids: Collection[str]) -> Exposure:
    """Search the whole registry. Only the ids are read from Parquet files, and only the text from rejected rows."""
    files = [info for info in store.list(DATASETS) if info.key.endswith(".parquet")]
    compared = [info for folder in (RUNS, runs.EVALUATIONS) for info in store.list(folder)]
    files += [info for info in compared if info.key.endswith(f"/{runs.EVALUATION_RECORDS}")]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = dict(zip(files, pool.map(lambda info: _held(store, info, record_ids), files), strict=True))
    holders = _holders(store, {info: ids for info, ids in found.items() if ids and info.key.startswith(DATASETS)})
    trained_on = {each.dataset_id for each in holders if {"train", "eval"} & set(each.parts)}
    return Exposure(
        tuple(holders),
        tuple(_exposed(store, trained_on)),
        tuple(
            sorted(info.key.split("/")[1] for info, ids in found.items() if ids and not info.key.startswith(DATASETS))
        ),
        tuple(store.uri(info.key) for info, ids in found.items() if ids is None),
    )


def _holders(store: Store, held: dict[ObjectInfo, set[str]]) -> list[Holder]:
    parts: dict[str, set[Part]] = defaultdict(set)
    ids: dict[str, set[str]] = defaultdict(set)
    for info, found in held.items():
        dataset, _, path = info.key.removeprefix(DATASETS).partition("/")
        parts[dataset].add("rejects" if path == REJECTS else cast(SplitName, path.partition("/")[0]))
        ids[dataset] |= found
    return [
        Holder(each, store.uri(f"{DATASETS}{each}"), tuple(sorted(parts[each])), tuple(sorted(ids[each])))
        for each in sorted(parts)
    ]


def _exposed(store: Store, datasets: Collection[str]) -> Iterable[Exposed]:
    """The versions that were trained on one of the datasets, their descendants, and those of unknown lineage."""
    made_of: dict[tuple[str, str], list[Ancestor]] = {}
    unknown: set[tuple[str, str]] = set()
    for name in versions.list_adapters(store):
        known = made_from(store, name)
        made_of |= {(name, version): ancestors for version, ancestors in known.items()}
        unknown |= {(name, version) for version in versions.version_ids(store, name) if version not in known}
    why: dict[tuple[str, str], tuple[Literal["dataset", "parent", "unknown"], str]] = {}
    for key, ancestors in made_of.items():
        if own := next((each.name for each in ancestors if each.kind == "dataset" and each.name in datasets), ""):
            why[key] = ("dataset", own)
    if datasets:
        why |= {key: ("unknown", "") for key in unknown}
    grown = True
    while grown:
        uris = {store.uri(version_key(*key)) for key in why}
        children = {
            key: ("parent", "")
            for key, ancestors in made_of.items()
            if key not in why and any(each.kind == "parent" and each.name in uris for each in ancestors)
        }
        why |= cast(dict[tuple[str, str], tuple[Literal["parent"], str]], children)
        grown = bool(children)
    pointers = {name: list_aliases(store, name) for name, _ in why}
    for (name, version), (reason, dataset) in sorted(why.items()):
        aliases = tuple(each.alias for each in pointers[name] if each.version == version)
        uri, revoked = store.uri(version_key(name, version)), _is_revoked(store, name, version)
        yield Exposed(name, version, uri, aliases, dataset, reason, revoked)


def _is_revoked(store: Store, name: str, version: str) -> bool:
    try:
        return bool(store.trusted_keys) and signing.is_revoked(store, name, version)
    except ObjectMissing:  # its publication has not ended
        return False


def _held(store: Store, info: ObjectInfo, record_ids: Collection[str]) -> set[str] | None:
    """The given ids that the file holds; None where it cannot be read."""
    import pyarrow as pa

    search = _rejected if info.key.endswith(f"/{REJECTS}") else _among
    try:
        return search(store, info, record_ids)
    except ObjectMissing:  # deleted since the listing
        return set()
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as exc:
        logger.warning("%s cannot be read: %s", store.uri(info.key), exc)
        return None


def _among(store: Store, info: ObjectInfo, record_ids: Collection[str]) -> set[str]:
    """The given ids that are in the file's `id` column."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted, found = pa.array(sorted(record_ids), pa.string()), set()
    with pq.ParquetFile(ObjectFile(store, info.key, info.size)) as file:
        for batch in file.iter_batches(columns=["id"], use_threads=False):
            found |= set(batch["id"].filter(pc.is_in(batch["id"], value_set=wanted)).to_pylist())
    return found


def _rejected(store: Store, info: ObjectInfo, record_ids: Collection[str]) -> set[str]:
    """The given ids that a rejected row's text holds as a value, or as a word where it is not a JSON object."""
    import pyarrow.parquet as pq

    found: set[str] = set()
    with pq.ParquetFile(ObjectFile(store, info.key, info.size)) as file:
        for batch in file.iter_batches(columns=["row"], use_threads=False):
            for row in batch["row"].to_pylist():
                found |= {each for each in record_ids if each in row and _names(row, each)}
    return found


def _names(row: str, record_id: str) -> bool:
    try:
        values = json.loads(row).values()
    except (ValueError, AttributeError, RecursionError):
        return re.search(rf"(?<!\w){re.escape(record_id)}(?!\w)", row) is not None
    return any(str(value) == record_id for value in values if isinstance(value, str | int))
