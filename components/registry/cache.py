"""The caches of the registry: one object an adapter, and the list of all adapters.

adapters/<name>/index/adapter.json.gz is not part of the registry: deleting it costs a minute. Its values are checked
before they are used (`is_so`): events, and what gc decides by, against the objects' etags; the rest is only shown, and
nothing that moves an alias, verifies or audits reads it.
"""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

from components.records.runs import PAGES
from components.registry.identity import adapter_key
from components.shared.errors import Conflict, IntegrityError, StoreError
from components.store.store import JSON, ObjectInfo, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

READS_AT_ONCE = 16
WORTH_AN_INDEX = 100
"""Up to this many objects, reading them one by one is faster than keeping an index."""
MAX_BYTES = 256 * 2**20
"""Maximum size of an unpacked index, of which a few bytes may unpack to more than memory holds."""
MOST_INDEXED_BYTES = 64 * 2**20
"""Maximum total size of indexed documents; above it no index is kept, and each document is read."""


class Index:
    """What was read of an adapter, by sections; the object is read at most once, and `keep` writes what is new."""

    def __init__(self, store: Store, name: str, what: str = "adapter", *, worth: int = 0) -> None:
        """It is read only if more than `worth` values are asked for, and written only if more than `worth` are new."""
        self._store, self._folder, self._worth = store, adapter_key(name, ""), worth
        self._key = f"{self._folder}index/{what}.json.gz"
        self._indexed: dict[str, dict[str, Any]] | None = None
        self._read_now: dict[str, dict[str, Any]] = {}
        self._num_new = 0

    def of(
        self, section: str, ids: Iterable[str], read: Callable[[str], Any | None], *, is_so: Callable[[str, Any], bool]
    ) -> dict[str, Any]:
        """Return what `read` returns for each id, as JSON values, in the order of the ids; from the index if it is
        there.

        What `read` returns must never change. Ids for which it returns None are left out, and read again the next time.
        `is_so` decides whether the index's value for an id can be what `read` would return; if not, `read` is called.
        """
        ids = list(ids)
        if self._indexed is None and len(ids) > self._worth:
            self._indexed = self._read()
        indexed = (self._indexed or {}).get(section, {})
        values = {key: indexed[key] for key in ids if key in indexed and is_so(key, indexed[key])}
        missing = [key for key in ids if key not in values]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            values |= zip(missing, pool.map(read, missing), strict=True)
        self._num_new += sum(values[key] not in (None, indexed.get(key)) for key in missing)
        values = {key: values[key] for key in ids if values[key] is not None}
        self._read_now[section] = self._read_now.get(section, {}) | values
        return values

    def documents(self, section: str, objects: Iterable[ObjectInfo]) -> dict[str, bytes]:
        """Return the content of these small objects of the adapter, by key; objects that are gone are left out.

        An entry counts only if the listing gives the MD5 of exactly its bytes as the object's etag; otherwise the
        object is read, as all are if the store encrypts with its own keys (SSE-KMS). So one may decide by them: write
        access to the index can slow the reader down, and nothing else.
        """
        infos = {info.key.removeprefix(self._folder): info for info in objects}
        if sum(info.size for info in infos.values()) > MOST_INDEXED_BYTES:
            self._worth = len(infos)

        # Latin-1 turns any bytes into text, and back without loss.
        def text(file: str) -> str | None:
            stored = self._store.read(f"{self._folder}{file}")
            return stored[0].decode("latin-1") if stored else None

        def is_of(file: str, text: Any) -> bool:
            if not isinstance(text, str) or len(text) != infos[file].size or max(text, default="") > "\xff":
                return False
            return hashlib.md5(text.encode("latin-1"), usedforsecurity=False).hexdigest() == infos[file].etag

        texts = self.of(section, infos, text, is_so=is_of)
        return {f"{self._folder}{file}": text.encode("latin-1") for file, text in texts.items()}

    def keep(self) -> None:
        """Write the index if enough of it is new: of the sections that were asked for what was asked for, and the
        others as they were. Without permission to write it, every reader reads the objects."""
        if self._num_new <= self._worth:
            return
        try:
            body = encode_json({**(self._indexed or {}), **self._read_now})
            self._store.put(self._key, gzip.compress(body, compresslevel=1, mtime=0), content_type="application/gzip")
        except (StoreError, ValueError) as exc:  # a ValueError where somebody put an infinite number there
            logger.debug("%s is not written: %s", self._store.uri(self._key), exc)

    def _read(self) -> dict[str, dict[str, Any]]:
        stored = self._store.read(self._key)
        if stored is None:
            return {}
        try:
            unpacked = gzip.GzipFile(fileobj=io.BytesIO(stored[0])).read(MAX_BYTES + 1)
            sections = json.loads(unpacked) if len(unpacked) <= MAX_BYTES else None
            if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
                raise ValueError(f"no JSON object of objects, of at most {MAX_BYTES >> 20} MiB")
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as exc:
            logger.warning("%s cannot be read, and is made anew: %s", self._store.uri(self._key), exc)
            return {}
        return sections


# The list of all adapters, beside the registry's pages, is only shown, too. Whoever changes what it says of an adapter
# writes the adapter's mark before and after. An entry counts only while the mark is the one from before the adapter was
# read: so an entry that is lost, or was written by one of two at once, leads to another reading, and to no wrong list.

LISTED = f"{PAGES}index.json"
"""The key of the list, with an entry for each adapter: what its page shows, and under `LISTING` what a list needs."""
LISTING = "listing"
CHANGED = f"{PAGES}changed/"
"""Key prefix of the marks."""
BEGUN, DONE = "being changed ", "changed "

Entries = dict[str, dict[str, Any]]


@contextlib.contextmanager
def changing(store: Store, name: str) -> Iterator[None]:
    """Mark the adapter before and after a change, which an error leaves as begun. A mark that cannot be written is left
    out: the change matters more."""

    def mark(what: str) -> None:
        try:
            store.put(f"{CHANGED}{name}", f"{what}{uuid.uuid4().hex}".encode(), content_type="text/plain")
        except StoreError as exc:
            logger.debug("the change of %s is not marked: %s", name, exc)

    mark(BEGUN)
    yield
    mark(DONE)


def mark_of(store: Store, name: str) -> str | None:
    """The adapter's mark, to be read before the adapter; empty if it was never changed, None while that goes on."""
    body, etag = store.read(f"{CHANGED}{name}") or (b"", "")
    return None if body.startswith(BEGUN.encode()) else etag.strip('"')


def is_settled(mark: ObjectInfo | None, now: datetime) -> bool:
    """Whether an adapter that is read after its mark was listed has all that this mark stands for."""
    begun_for_good = mark is not None and now - mark.last_modified > timedelta(minutes=15)  # made by now, or never
    return mark is None or mark.size != len(BEGUN) + 32 or begun_for_good


def write_entries(
    store: Store, change: Callable[[Entries], Entries], read: tuple[Entries, str | None] | None = None
) -> Entries:
    """Replace the entries by what `change` makes of them, and return these; `read` is what has been read of them.

    Where others keep writing, or the list may not be written, it is left to the next writer.
    """
    for _ in range(5):
        (entries, etag), read = read or read_entries(store), None
        changed = change(entries)
        try:
            if etag is None:
                store.create(LISTED, encode_json(changed), content_type=JSON)
            elif changed != entries:
                store.swap(LISTED, encode_json(changed), etag, content_type=JSON)
            break
        except Conflict:
            continue
        except StoreError as exc:
            logger.debug("%s is not written: %s", store.uri(LISTED), exc)
            break
    return changed


def forget(store: Store, name: str) -> None:
    """Remove the adapter's entry, as a person has moved its alias: the next run of any adapter then reads it again."""
    write_entries(store, lambda entries: {other: entry for other, entry in entries.items() if other != name})


def read_entries(store: Store) -> tuple[Entries, str | None]:
    """The entries by the adapters' names, and the list's etag; what is damaged is left out, and made anew."""
    body, etag = store.read(LISTED) or (b"{}", None)
    listed = None
    with contextlib.suppress(IntegrityError):
        listed = decode_json(body, LISTED)
    entries = listed.items() if isinstance(listed, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}, etag
