"""The list of all adapters, kept in one object beside the registry's pages, so that it is read in three requests.

It is no part of the registry: it is only shown, and nothing that moves an alias, verifies, audits or removes reads it.
Whoever changes what it says of an adapter writes the adapter's mark, pages/changed/<name>, before and after the change.
An entry counts only while the mark is the one from before the adapter was read. So an entry that is missing or lost, or
was written by one of two at once that had not seen the other, leads to another reading, and to no wrong list.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from components.records.runs import PAGES
from components.shared.errors import Conflict, IntegrityError, StoreError
from components.store.store import JSON, ObjectInfo, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

LISTED = f"{PAGES}index.json"
"""The key of the list, with an entry for each adapter: what its page shows, and under `LISTING` what a list needs."""
LISTING = "listing"
CHANGED = f"{PAGES}changed/"
"""Key prefix of the marks."""
BEGUN, DONE = "being changed ", "changed "
A_CHANGE_TAKES = timedelta(minutes=15)
"""Age after which a change that has begun is made, or never will be."""
TOKEN_DIGITS = 32
ATTEMPTS = 5

Entries = dict[str, dict[str, Any]]


@contextlib.contextmanager
def changing(store: Store, name: str) -> Iterator[None]:
    """Mark the adapter before and after a change, which an error leaves as begun. A mark that cannot be written is left
    out: the change matters more."""
    _mark(store, name, BEGUN)
    yield
    _mark(store, name, DONE)


def mark_of(store: Store, name: str) -> str | None:
    """The adapter's mark, to be read before the adapter; empty if it was never changed, None while that goes on."""
    found = store.read(f"{CHANGED}{name}")
    if found and found[0].startswith(BEGUN.encode()):
        return None
    return found[1].strip('"') if found else ""


def is_settled(mark: ObjectInfo | None, now: datetime) -> bool:
    """Whether an adapter that is read after its mark was listed has all that this mark stands for."""
    return mark is None or mark.size != len(BEGUN) + TOKEN_DIGITS or now - mark.last_modified > A_CHANGE_TAKES


def write_entries(
    store: Store, change: Callable[[Entries], Entries], read: tuple[Entries, str | None] | None = None
) -> Entries:
    """Replace the entries by what `change` makes of them, and return these; `read` is what has been read of them.

    Where others keep writing, or the list may not be written, it is left to the next writer.
    """
    for _ in range(ATTEMPTS):
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
    found, listed = store.read(LISTED), None
    with contextlib.suppress(IntegrityError):
        listed = decode_json(found[0], LISTED) if found else None
    entries = listed.items() if isinstance(listed, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}, found[1] if found else None


def _mark(store: Store, name: str, what: str) -> None:
    try:
        store.put(f"{CHANGED}{name}", f"{what}{uuid.uuid4().hex}".encode(), content_type="text/plain")
    except StoreError as exc:
        logger.debug("the change of %s is not marked: %s", name, exc)
