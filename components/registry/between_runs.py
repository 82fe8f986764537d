"""What a run leaves for later ones: which data it consumed, the learning rates that sweeps found, and erased records.

A run records what it read in runs/<run_id>/consumed/ before it trains: first the contents, in a file named by its hash,
then the small header.json that names the file. When it ends in a decision, promoted or held,
adapters/<name>/watermark.json moves to that note by compare-and-swap. A run that fails or is skipped moves nothing, so
that what it saw is new again for the next one.
"""

import hashlib
import logging
import re
from array import array
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Record
from components.registry.identity import adapter_key
from components.shared.errors import Conflict, DataError, IntegrityError, ObjectMissing, UserError
from components.shared.parquet import table_of
from components.shared.protocol import counted
from components.store import folders
from components.store.store import JSON, ObjectFile, Store, decode_json, encode_json

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

FORMAT = 1
ATTEMPTS = 5
ID_BYTES = 8
"""Number of bytes kept of a content's sha256. Of m new records beside n known ones, m * n / 2**64 are expected to be
mistaken for known: 5e-8 for a million beside a million."""
_COLUMN = "content"


@dataclass(frozen=True)
class Consumed:
    """What one run read; the contents themselves lie in `file`."""

    run_id: str
    as_of: str
    """When the run read its data, in the registry's time format."""
    sources: Mapping[str, str]
    """Fingerprint of each file or object, by its name."""
    num_records: int
    """Number of distinct records."""
    file: str
    """Name of the contents' file in the run's folder."""


def content_ids(contents: Iterable[bytes]) -> "pa.UInt64Array":
    """Return the first 64 bits of each content's sha256, sorted."""
    import pyarrow as pa

    ids = array("Q", (int.from_bytes(content[:ID_BYTES]) for content in contents))
    return pa.Array.from_buffers(pa.uint64(), len(ids), [None, pa.py_buffer(ids)]).sort()


def note_consumed(
    store: Store, run_id: str, *, as_of: str, sources: Mapping[str, str], contents: "pa.UInt64Array"
) -> Consumed:
    """Write what a run read, with `contents` from `content_ids`; a retried step writes it again."""
    packed = _packed(contents)
    file = f"{runs.CONSUMED}{hashlib.sha256(packed).hexdigest()}.parquet"
    store.put(runs.run_key(run_id, file), packed)
    body = {
        "format": FORMAT,
        "run_id": run_id,
        "as_of": as_of,
        "sources": dict(sources),
        "num_records": len(contents),
        "file": file,
    }
    store.put_json(_header_key(run_id), body)
    return Consumed(run_id, as_of, dict(sources), len(contents), file)


def consumed_contents(store: Store, consumed: Consumed) -> "pa.UInt64Array":
    """Return the ids of the contents that the run read, sorted; empty if their file is gone.

    Raises:
        IntegrityError: they are not what the run wrote.
    """
    key = runs.run_key(consumed.run_id, consumed.file)
    found = store.read(key)
    if found is None:
        logger.info("%s is gone: everything counts as new", store.uri(key))
        return content_ids([])
    if f"{runs.CONSUMED}{hashlib.sha256(found[0]).hexdigest()}.parquet" != consumed.file:
        raise IntegrityError(f"{store.uri(key)} has another content than its name says")
    ids: pa.UInt64Array = table_of(found[0])[_COLUMN].combine_chunks()
    return ids


def read_watermark(store: Store, name: str) -> Consumed | None:
    """Return what the adapter's newest finished run read; None if there is no such run, or its note is gone.

    Raises:
        IntegrityError: the mark or the note is not one of a format that this version knows.
    """
    found = _mark(store, name)
    if found is None:
        return None
    run_id = found[0]["run_id"]
    try:
        return _note(store, run_id)
    except ObjectMissing:
        logger.info("run %s finished last, and its note of what it read is gone: everything counts as new", run_id)
        return None


def consumed_by(store: Store, run_id: str) -> Consumed | None:
    """Return what the run read; None if it noted nothing.

    Raises:
        IntegrityError: the note is not one of a format that this version knows.
    """
    try:
        return _note(store, run_id)
    except ObjectMissing:
        return None


def advance_watermark(store: Store, name: str, run_id: str) -> bool:
    """Move the adapter's mark to what the run read; False when a run that looked later has moved it already.

    Raises:
        ObjectMissing: the run noted nothing.
        Conflict: other runs kept moving the mark.
    """
    as_of = _note(store, run_id).as_of
    body = encode_json({"format": FORMAT, "run_id": run_id, "as_of": as_of})
    key = adapter_key(name, "watermark.json")
    for _ in range(ATTEMPTS):
        found = _mark(store, name)
        try:
            if found is None:
                store.create(key, body, content_type=JSON)
                return True
            theirs, etag = found
            if theirs["as_of"] >= as_of:
                return theirs["run_id"] == run_id
            store.swap(key, body, etag, content_type=JSON)
            return True
        except Conflict:
            continue
    raise Conflict(f"{store.uri(key)} was moved by other runs {ATTEMPTS} times in a row: run the step again")


def _mark(store: Store, name: str) -> tuple[dict[str, str], str] | None:
    key = adapter_key(name, "watermark.json")
    found = store.read(key)
    if found is None:
        return None
    mark = decode_json(found[0], store.uri(key))
    if not isinstance(mark, dict) or mark.get("format") != FORMAT or not {"run_id", "as_of"} <= mark.keys():
        raise IntegrityError(f"{store.uri(key)} is not a watermark of format {FORMAT}")
    return mark, found[1]


def _note(store: Store, run_id: str) -> Consumed:
    key = _header_key(run_id)
    body = store.get_json(key)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise IntegrityError(f"{store.uri(key)} is not a note of format {FORMAT}")
    return Consumed(body["run_id"], body["as_of"], body["sources"], body["num_records"], body["file"])


def _header_key(run_id: str) -> str:
    return runs.run_key(run_id, f"{runs.CONSUMED}header.json")


def _packed(contents: "pa.UInt64Array") -> bytes:
    """Pack n ids as Parquet: 5.9 bytes per id for a million and 7.7 for a thousand.

    The least possible is log2(2**64 / n) + 1.44 bits. Compressing the delta-coded ids saves nothing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({_COLUMN: contents}),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={_COLUMN: "DELTA_BINARY_PACKED"},
    )
    return sink.getvalue().to_pybytes()


# The learning rates that sweeps have found, stored for later runs.
#
# adapters/<name>/rates/<key>.json is the newest rate for one base, recipe and data source; the sweep that found it
# stays in its run's folder. The key is made of all that a rate depends on and that stays the same from one night to the
# next: the data's source, not the records that it holds today.


class FoundRate(Record):
    """A learning rate that a sweep found."""

    FILE: ClassVar[str] = "rates/<key>.json"

    learning_rate: float
    loss: float
    """Validation loss of the sweep's training at this rate."""
    is_inside: bool
    """Whether the neighbouring rates that were tried were worse."""
    method: str
    run_id: str
    """The id of the sweep's run."""
    dataset_id: str
    """The id of the dataset that the rate was found on."""
    base: str
    """The base model's name in the config."""
    rank: int
    batch_size: int
    train_records: int


def remember_rate(store: Store, config: RunConfig, found: FoundRate) -> None:
    """Store the rate for runs of this config, replacing an earlier one."""
    store.put(_key(config), found.as_json(), content_type=JSON)


def recall_rate(store: Store, config: RunConfig) -> FoundRate | None:
    """Return what the newest sweep found for runs of this config; None if there was no sweep.

    Raises:
        IntegrityError: the record is malformed.
    """
    key = _key(config)
    found = store.read(key)
    return FoundRate.from_json(found[0], store.uri(key)) if found else None


def similar_rates(store: Store, config: RunConfig) -> list[FoundRate]:
    """Return what sweeps found for the adapter's base and method, at any rank, batch size and data.

    Raises:
        IntegrityError: a record is malformed.
    """
    keys = [entry.key for entry in store.list(adapter_key(config.adapter.name, "rates/"))]
    found = [FoundRate.from_json(store.get(key), store.uri(key)) for key in keys]
    return [each for each in found if (each.base, each.method) == (config.model.base, config.method.name)]


def _key(config: RunConfig) -> str:
    row = config.method.row
    depends_on = {
        "base": [config.model.base, config.model.revision],
        "source": config.data.source,
        "method": [row.adapter, row.scaling, row.init, row.base, config.method.r, config.method.lora_alpha],
        "target_modules": config.method.target_modules,
        "batch_size": config.train.batch_size,
        "loss_on": config.data.loss_on,
    }
    digest = hashlib.sha256(encode_json(depends_on)).hexdigest()[:16]
    return adapter_key(config.adapter.name, f"rates/{digest}.json")


# Records that are never to be trained on again, whatever their source still holds.
#
# Each has an object erased/<sha256>.json, whose name alone says which record it is: so two erasures at the same time
# cannot lose one another, and a preparation only needs a listing. Nothing of the record is kept but the hash of its id.
# Nothing here undoes an erasure.

ERASED = "erased/"
ERASURE_FORMAT = 1
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
        body = {"format": ERASURE_FORMAT, "record": record, "at": at, "by": by}
        store.create(key, encode_json(body), content_type=JSON)
    except Conflict:
        earlier = decode_json(store.get(key), store.uri(key))
        if not isinstance(earlier, dict) or not {"at", "by"} <= earlier.keys():
            raise IntegrityError(f"{store.uri(key)} is not an erasure of format {ERASURE_FORMAT}") from None
        return Erasure(record, str(earlier["at"]), str(earlier["by"]), is_new=False)
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
