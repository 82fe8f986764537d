"""Records that are never to be trained on again, whatever their source still holds.

Each has an object erased/<sha256>.json, whose name alone says which record it is: so two erasures at the same time
cannot lose one another, and a preparation only needs a listing. Nothing of the record is kept but the hash of its id.
Nothing here undoes an erasure.
"""

import hashlib
import re
from collections.abc import Set
from dataclasses import dataclass

from components.shared.durations import counted
from components.shared.errors import Conflict, DataError, IntegrityError, UserError
from components.store import folders
from components.store.store import JSON, ObjectFile, Store, decode_json, encode_json

ERASED = "erased/"
FORMAT = 1
_NAME = re.compile(r"([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class Erasure:
    """The first erasure of one record."""

    record: str
    """The sha256 of its id, in hex."""
    at: str
    by: str
    is_new: bool
    """False if the record had been erased before."""


@dataclass(frozen=True)
class Erased:
    """All erased records, by the hashes of their ids."""

    records: Set[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.records)

    def has(self, record_id: str) -> bool:
        """Whether the record with this id was erased."""
        return record_hash(record_id) in self.records


NONE_ERASED = Erased()


def record_hash(record_id: str) -> str:
    """The hash that stands for the record in the store."""
    return hashlib.sha256(f"fineloop record {record_id}".encode(errors="surrogatepass")).hexdigest()


def erase(store: Store, record_id: str, *, by: str) -> Erasure:
    """Record that the record is never to be trained on again; if it was erased before, the first erasure stays.

    Raises:
        UserError: the id is empty.
        IntegrityError: the earlier erasure is damaged.
    """
    if not record_id:
        raise UserError("a record's id is empty: give it as the dataset has it")
    record, at = record_hash(record_id), folders.now()
    key = f"{ERASED}{record}.json"
    try:
        body = {"format": FORMAT, "record": record, "at": at, "by": by}
        store.create(key, encode_json(body), content_type=JSON)
    except Conflict:
        noted = decode_json(store.get(key), store.uri(key))
        if not isinstance(noted, dict) or not {"at", "by"} <= noted.keys():
            raise IntegrityError(f"{store.uri(key)} is not an erasure of format {FORMAT}") from None
        return Erasure(record, str(noted["at"]), str(noted["by"]), is_new=False)
    return Erasure(record, at, by, is_new=True)


def erased(store: Store) -> Erased:
    """All records that were erased.

    Raises:
        IntegrityError: there is another object among them, so that it is unknown which record was meant.
    """
    found: set[str] = set()
    for info in store.list(ERASED):
        named = _NAME.fullmatch(info.key.removeprefix(ERASED))
        if named is None:
            raise IntegrityError(f"{store.uri(info.key)} is not an erasure: remove it, or erase the record it means")
        found.add(named[1])
    return Erased(frozenset(found))


def require_none_erased(store: Store, dataset_uri: str) -> None:
    """Require of a dataset that none of its records was erased after it was made.

    Raises:
        DataError: some were.
    """
    import pyarrow.parquet as pq

    known, root, found = erased(store), f"{store.key(dataset_uri).rstrip('/')}/", set[str]()
    for info in store.list(root) if known else ():
        if "/" in info.key.removeprefix(root) and info.key.endswith(".parquet"):  # of a split
            with pq.ParquetFile(ObjectFile(store, info.key, info.size)) as file:
                for batch in file.iter_batches(columns=["id"], use_threads=False):
                    found.update(filter(known.has, batch["id"].to_pylist()))
    if found:
        raise DataError(
            f"{dataset_uri} holds {counted(len(found), 'record')} that {'was' if len(found) == 1 else 'were'} erased "
            "after it was made, and is not trained on again: prepare the data anew, as a new run does"
        )
