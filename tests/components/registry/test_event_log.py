"""What lies among an adapter's events and is none: its id fits its content, as whoever may write there can make it.

The judge is what reads the log for a decision: the gate's count of looks, which met a number for a list before.
"""

from typing import Any

import pytest

from components.registry.audit import audit
from components.registry.event import EventKind
from components.registry.event_log import append_event, events
from components.registry.looks import looks
from components.store.store import Store

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
    assert looks(log, "production", ["a"], run_id="now") == 2
    junk = [finding for finding in audit(store, "icd").findings if "is not an event" in finding.what]
    assert len(junk) == len(KINDS)
