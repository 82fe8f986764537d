"""What an adapter has consumed of its data: where a scheduled run begins.

A run notes what it read in runs/<run_id>/consumed.json before it trains. When it ends in a decision, promoted or held,
adapters/<name>/watermark.json moves to that note by compare-and-swap. A run that fails or is skipped moves nothing, so
that what it saw is new again for the next one.
"""

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass

from components.records import runs
from components.registry.names import adapter_key
from components.shared.errors import Conflict, IntegrityError, ObjectMissing
from components.store.store import JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

FORMAT = 1
ATTEMPTS = 5


@dataclass(frozen=True)
class Consumed:
    """What one run read."""

    run_id: str
    as_of: str
    """When it looked, as the registry spells time."""
    sources: Mapping[str, str]
    """Name of each file or object to its fingerprint."""
    records: Set[str]
    """First 16 hex digits of the sha256 of each distinct record's prompt and answer."""


def note(store: Store, consumed: Consumed) -> None:
    """Write what a run read; a retried step writes it again."""
    body = {
        "format": FORMAT,
        "run_id": consumed.run_id,
        "as_of": consumed.as_of,
        "sources": dict(consumed.sources),
        "records": sorted(consumed.records),
    }
    store.put_json(_note_key(consumed.run_id), body)


def read(store: Store, name: str) -> Consumed | None:
    """What the adapter's newest finished run read, or None when there is none, or its note is gone.

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


def noted(store: Store, run_id: str) -> Consumed | None:
    """What the run read, None where it noted nothing.

    Raises:
        IntegrityError: the note is not one of a format that this version knows.
    """
    try:
        return _note(store, run_id)
    except ObjectMissing:
        return None


def advance(store: Store, name: str, run_id: str) -> bool:
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
    key = _note_key(run_id)
    body = store.get_json(key)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise IntegrityError(f"{store.uri(key)} is not a note of format {FORMAT}")
    return Consumed(body["run_id"], body["as_of"], body["sources"], frozenset(body["records"]))


def _note_key(run_id: str) -> str:
    return runs.run_key(run_id, runs.CONSUMED)
