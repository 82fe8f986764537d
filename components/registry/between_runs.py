"""What a run leaves for later ones: which data it consumed, the learning rates that sweeps found, and erased records.

A run records what it read in runs/<run_id>/consumed/ before it trains. When it ends in a decision, promoted or held,
adapters/<name>/watermark.json moves to that note; what a run saw that fails or is skipped is new again for the next.
"""

import hashlib
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar

from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Record
from components.registry.identity import adapter_key
from components.shared.errors import Conflict, DataError, IntegrityError, UserError
from components.shared.parquet import table_of
from components.shared.protocol import counted
from components.store import folders
from components.store.store import JSON, ObjectFile, Store, decode_json, encode_json

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

ATTEMPTS = 5
CLOCKS_DIFFER_BY = timedelta(minutes=10)
"""The most that the clocks of two pods may differ."""
ID_BYTES = 8
"""Number of bytes kept of a content's sha256. Of m new records beside n known ones, m * n / 2**64 are expected to be
mistaken for known: 5e-8 for a million beside a million."""
_COLUMN = "content"


class Consumed(Record):
    """What one run read; the contents themselves lie in `file`."""

    FILE: ClassVar[str] = f"{runs.CONSUMED}header.json"

    run_id: str
    as_of: str
    """When the run read its data, in the registry's time format."""
    sources: dict[str, str]
    """Fingerprint of each file or object, by its name."""
    num_records: int
    """Number of distinct records."""
    file: str
    """Name of the contents' file in the run's folder."""


class Watermark(Record):
    """The adapter's newest run that ended in a decision."""

    FILE: ClassVar[str] = "watermark.json"

    run_id: str
    as_of: str
    """When it read its data."""


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
    consumed = Consumed(run_id=run_id, as_of=as_of, sources=dict(sources), num_records=len(contents), file=file)
    runs.write(store, run_id, consumed)
    return consumed


def consumed_contents(store: Store, consumed: Consumed) -> "pa.UInt64Array":
    """Return the ids of the contents that the run read, sorted; empty if their file is gone. Raises IntegrityError if
    they are not what the run wrote."""
    key = runs.run_key(consumed.run_id, consumed.file)
    stored = store.read(key)
    if stored is None:
        logger.info("%s is gone: everything counts as new", store.uri(key))
        return content_ids([])
    if f"{runs.CONSUMED}{hashlib.sha256(stored[0]).hexdigest()}.parquet" != consumed.file:
        raise IntegrityError(f"{store.uri(key)} has another content than its name says")
    ids: pa.UInt64Array = table_of(stored[0])[_COLUMN].combine_chunks()
    return ids


def are_new_since(store: Store, run_id: str, contents: Iterable[bytes]) -> list[bool] | None:
    """Whether the run did not read each of these contents; None if what it read is not known. Raises IntegrityError if
    its note is malformed."""
    import numpy as np

    consumed = runs.find(store, run_id, Consumed) if run_id else None
    read = consumed_contents(store, consumed).to_numpy() if consumed else np.zeros(0, np.uint64)
    if not len(read):
        return None
    ids = np.array([int.from_bytes(content[:ID_BYTES]) for content in contents], np.uint64)
    return list((read[np.searchsorted(read, ids).clip(max=len(read) - 1)] != ids).tolist())


def read_watermark(store: Store, name: str) -> Consumed | None:
    """Return what the adapter's newest finished run read; None if there is no such run, or its note is gone. Raises
    IntegrityError if the mark or the note is malformed, or the mark is of a time to come."""
    marked = _mark(store, name)
    consumed = runs.find(store, marked[0].run_id, Consumed) if marked else None
    if marked and not consumed:
        run_id = marked[0].run_id
        logger.info("run %s finished last, and its note of what it read is gone: everything counts as new", run_id)
    return consumed


def advance_watermark(store: Store, name: str, run_id: str) -> bool:
    """Move the adapter's mark to what the run read; False when a run that looked later has moved it already. Raises
    ObjectMissing if the run noted nothing; IntegrityError if the note or the mark is malformed, or of a time to come;
    Conflict if other runs kept moving the mark."""
    mark = Watermark(run_id=run_id, as_of=runs.read(store, run_id, Consumed).as_of)
    _require_past(mark, store.uri(runs.run_key(run_id, Consumed.FILE)))
    key = adapter_key(name, Watermark.FILE)
    for _ in range(ATTEMPTS):
        marked = _mark(store, name)
        if marked and marked[0].as_of >= mark.as_of:
            return marked[0].run_id == run_id
        try:
            if marked:
                store.swap(key, mark.as_json(), marked[1], content_type=JSON)
            else:
                store.create(key, mark.as_json(), content_type=JSON)
            return True
        except Conflict:
            continue
    raise Conflict(f"{store.uri(key)} was moved by other runs {ATTEMPTS} times in a row: run the step again")


def _mark(store: Store, name: str) -> tuple[Watermark, str] | None:
    key = adapter_key(name, Watermark.FILE)
    stored = store.read(key)
    if stored is None:
        return None
    mark = Watermark.from_json(stored[0], store.uri(key))
    _require_past(mark, store.uri(key))
    return mark, stored[1]


def _require_past(mark: Watermark, uri: str) -> None:
    """Raise IntegrityError if the run read its data in a time to come: no later run could move such a mark."""
    latest = (datetime.now(UTC) + CLOCKS_DIFFER_BY).isoformat()
    if mark.as_of > latest:
        raise IntegrityError(
            f"{uri} says that run {mark.run_id} read its data at {mark.as_of}, which is yet to come: a clock is "
            "wrong, or somebody else wrote it; set it right, or remove it, and everything counts as new"
        )


def _packed(contents: "pa.UInt64Array") -> bytes:
    """Pack n ids as Parquet: 5.9 bytes per id for a million; the least possible is log2(2**64 / n) + 1.44 bits."""
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
    """The sweep's run."""
    dataset_id: str
    base: str
    """The base model's name in the config."""
    rank: int
    batch_size: int
    train_records: int


def remember_rate(store: Store, config: RunConfig, rate: FoundRate) -> None:
    """Store the rate for runs of this config, replacing an earlier one."""
    store.put(_key(config), rate.as_json(), content_type=JSON)


def recall_rate(store: Store, config: RunConfig) -> FoundRate | None:
    """Return what the newest sweep found for runs of this config; None if there was no sweep. Raises IntegrityError if
    the record is malformed."""
    key = _key(config)
    stored = store.read(key)
    return FoundRate.from_json(stored[0], store.uri(key)) if stored else None


def _key(config: RunConfig) -> str:
    """Made of all that a rate depends on and that stays the same from one night to the next."""
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


# Records that are never to be trained on again. Each has an object erased/<sha256>.json, whose name alone says which it
# is: so two erasures at once cannot lose one another, and nothing of the record is kept but the hash of its id.

ERASED = "erased/"


@dataclass(frozen=True)
class Erasure:
    """The first erasure of one record."""

    record: str
    """The sha256 of its id, or its user's, in hex."""
    at: str
    by: str
    is_new: bool
    """False if the record had been erased before."""


class Erased(frozenset[str]):
    """All erased records, by the hashes of their ids."""

    def has(self, record_id: str) -> bool:
        """Whether the record with this id was erased."""
        return record_hash(record_id) in self


NONE_ERASED = Erased()
OF_PEOPLE = ("user", "rater")
"""The columns of a dataset, where it has them, with the hashes of the users whose words a record holds."""


def record_hash(record_id: str) -> str:
    """The hash that stands for the record in the store."""
    return hashlib.sha256(f"fineloop record {record_id}".encode(errors="surrogatepass")).hexdigest()


def user_hash(user: str) -> str:
    """The hash that stands for a user, or a rater, in datasets and in the store."""
    return hashlib.sha256(f"fineloop user {user}".encode(errors="surrogatepass")).hexdigest()


def erase(store: Store, name: str, *, by: str, hash_of: Callable[[str], str] = record_hash) -> Erasure:
    """Record that the record with this id, or with `user_hash` each of this user's, is never to be trained on again; if
    it was erased before, the first erasure stays. Raises UserError if the name is empty; IntegrityError if the earlier
    erasure is damaged."""
    if not name:
        raise UserError("a record's id is empty: give it as the dataset has it")
    record, at = hash_of(name), folders.now()
    key = f"{ERASED}{record}.json"
    try:
        body = {"format": 1, "record": record, "at": at, "by": by}
        store.create(key, encode_json(body), content_type=JSON)
    except Conflict:
        earlier = decode_json(store.get(key), store.uri(key))
        if not isinstance(earlier, dict) or not {"at", "by"} <= earlier.keys():
            raise IntegrityError(f"{store.uri(key)} is not an erasure") from None
        return Erasure(record, str(earlier["at"]), str(earlier["by"]), is_new=False)
    return Erasure(record, at, by, is_new=True)


def erased(store: Store) -> Erased:
    """All records that were erased. Raises IntegrityError if there is another object among them, so that it is unknown
    which record was meant."""
    records = set()
    for info in store.list(ERASED):
        named = re.fullmatch(rf"{ERASED}([0-9a-f]{{64}})\.json", info.key)
        if named is None:
            raise IntegrityError(f"{store.uri(info.key)} is not an erasure: remove it, or erase the record it means")
        records.add(named[1])
    return Erased(records)


def require_none_erased(store: Store, dataset_uri: str) -> None:
    """Require of a dataset that none of its records was erased after it was made. Raises DataError if some were."""
    import pyarrow.parquet as pq

    gone, root, ids = erased(store), f"{store.key(dataset_uri).rstrip('/')}/", set[str]()
    for info in store.list(root) if gone else ():
        if "/" in info.key.removeprefix(root) and info.key.endswith(".parquet"):  # of a split
            with pq.ParquetFile(ObjectFile(store, info.key, info.size)) as file:
                for batch in file.iter_batches(columns=["id", *OF_PEOPLE], use_threads=False):
                    for row in batch.to_pylist():
                        if gone.has(row["id"]) or gone.intersection(row.get(name) for name in OF_PEOPLE):
                            ids.add(row["id"])
    if ids:
        raise DataError(
            f"{dataset_uri} holds {counted(len(ids), 'record')} that {'was' if len(ids) == 1 else 'were'} erased "
            "after it was made, and is not trained on again: prepare the data anew, as a new run does"
        )
