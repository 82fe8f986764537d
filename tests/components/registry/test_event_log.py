"""What lies among an adapter's events and is none: its id fits its content, as whoever may write there can make it.

The judge is what reads the log for a decision: the gate's count of looks, which met a number for a list before.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from components.registry.aliases import Cause, promote, rollback
from components.registry.audit import audit
from components.registry.event_log import (
    EventKind,
    append_event,
    decided_before,
    events,
    is_chain,
    moves,
    publication,
    require_published,
)
from components.registry.identity import version_key
from components.shared.errors import IntegrityError
from components.store.folders import read_manifest
from components.store.store import BINARY, Store

KINDS: tuple[EventKind, ...] = ("published", "promoted", "refused", "proposed")
SOUND = {"alias": "production", "run_id": "r", "test_set": ["a"], "from": None, "to": "v0", "manifest_sha256": "0"}


@pytest.mark.parametrize(
    "odd",
    [
        {"test_set": 7},
        {"test_set": [7]},
        {"run_id": ["r"]},
        {"alias": ["production"]},
        {"version": {"v": 1}},
        {"evidence": []},
        {"evidence": {"test_set": 7}},
        {"evidence": {"anchor": 7}},
        {"previous": {"time": "today"}},
        {"reasons": "worse"},
    ],
    ids=str,
)
def test_an_event_of_an_odd_shape_is_passed_over_and_found(store: Store, odd: dict[str, Any]) -> None:
    append_event(store, "icd", "refused", SOUND)
    for kind in KINDS:
        append_event(store, "icd", kind, {**SOUND, **odd})
    log = events(store, "icd")
    assert [event.body for event in log] == [SOUND]
    assert len(decided_before(log, "production", ["a"], run_id="now")) == 1
    junk = [finding for finding in audit(store, "icd").findings if "is not an event" in finding.what]
    assert len(junk) == len(KINDS)


class Squatted(Store):
    """A store in which somebody has written something else under the name of each event before its writer comes."""

    junk = b'{"format":1}'

    def create(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> str:
        if re.search(r"Z-[0-9a-f]{12}\.json$", key) and not self.exists(key):
            self.put(key, self.junk)
        return super().create(key, body, content_type=content_type)


def squatted(store: Store, junk: bytes = Squatted.junk) -> Squatted:
    found = Squatted(store._client, store.bucket, store.prefix)
    found.junk = junk
    return found


@pytest.mark.parametrize("junk", [b'{"format":1}', b"anything at all", b""], ids=str)
def test_something_else_under_a_moves_name_loses_no_move(store: Store, versions: list[str], junk: bytes) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    moved = promote(squatted(store, junk), "icd", two, cause=Cause("r1"))
    assert moved.uri.removesuffix(".json")[-17] == "-"  # a further name
    promote(store, "icd", three)
    made = moves(events(store, "icd"), "production")
    assert [each.body["to"] for each in made] == [one, two, three]
    assert is_chain(made)
    findings = audit(store, "icd").findings
    assert [finding.where for finding in findings] == [f"{moved.uri[:-22]}.json"]
    assert findings[0].what.startswith("is not an event")
    assert rollback(store, "icd").body["to"] == two
    assert promote(store, "icd", two, cause=Cause("r1")).body["to"] == two
    assert rollback(store, "icd").body["to"] == one
    store.delete([store.key(findings[0].where)])  # as whoever reads the audit does
    assert audit(store, "icd").findings == ()
    assert rollback(store, "icd", to=two).body["to"] == two
    assert len(moves(events(store, "icd"), "production")) == 6


def test_something_else_under_an_outcomes_name_loses_no_outcome(store: Store) -> None:
    uri = append_event(squatted(store), "icd", "refused", SOUND)
    store.put(f"adapters/icd/events/2001-{uri.rpartition('Z-')[2]}", b"{}")
    assert [event.uri for event in events(store, "icd")] == [uri]
    assert append_event(store, "icd", "refused", SOUND) == uri
    assert len(events(store, "icd")) == 1


def test_an_object_of_a_publications_name_vouches_for_nothing(store: Store, versions: list[str]) -> None:
    key = version_key("icd", versions[0])
    manifest = read_manifest(store, key)
    store.put(f"{key}/manifest.json", manifest.body.replace(b'"run_id":"r0"', b'"run_id":"r9"'))
    forged = read_manifest(store, key)
    assert forged.sha256 != manifest.sha256
    uri = append_event(store, "icd", "published", publication(versions[0], forged), at=forged.created_at)
    require_published(store, "icd", versions[0], forged)
    for junk in (b"anything at all", store.get(store.key(uri)).replace(b"r9", b"r0")):
        store.put(store.key(uri), junk)
        with pytest.raises(IntegrityError, match="no event says"):
            require_published(store, "icd", versions[0], forged)
