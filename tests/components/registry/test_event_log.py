"""What lies among an adapter's events and is none, and what a further decision on the same records asks for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from components.registry import event_log
from components.registry.aliases import Cause, promote, rollback
from components.registry.audit import audit
from components.registry.event_log import Event, EventKind, append_event, confidence_at, decided_before, events, moves
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


def squatted(store: Store) -> Squatted:
    return Squatted(store._client, store.bucket, store.prefix)


def test_something_else_under_a_moves_name_loses_no_move(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    in_its_place = squatted(store)
    in_its_place.junk = b"no JSON"
    moved = promote(in_its_place, "icd", two, cause=Cause("r1"))
    assert moved.uri.removesuffix(".json")[-17] == "-"  # a further name
    promote(store, "icd", three)
    made = moves(events(store, "icd"), "production")
    assert [each.body["to"] for each in made] == [one, two, three]
    assert event_log.is_chain(made)
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
    uri = append_event(store, "icd", "published", event_log.publication(versions[0], forged), at=forged.created_at)
    event_log.require_published(store, "icd", versions[0], forged)
    for junk in (b"anything at all", store.get(store.key(uri)).replace(b"r9", b"r0")):
        store.put(store.key(uri), junk)
        with pytest.raises(IntegrityError, match="no event says"):
            event_log.require_published(store, "icd", versions[0], forged)


ALPHA = 0.05


def test_a_look_spends_more_for_each_that_passed_before() -> None:
    """LOND (Javanmard and Montanari, arXiv:1502.06197), with 1 / (k (k + 1)) as the parts of the error rate."""
    assert 1 - confidence_at(20, 0.95, 16) == pytest.approx(ALPHA * 16 / 420)
    assert confidence_at(20, 0.95, 1) == confidence_at(20, 0.95, 0) == confidence_at(20, 0.95)
    assert all(0.95 < confidence_at(look, 0.95, look - 1) < 1 for look in range(1, 1000))


@pytest.mark.parametrize(("bad", "shared"), [(0.2, 0.9), (0.5, 0.5), (0.9, 0.0)])
def test_the_share_of_wrong_ones_among_those_that_pass_is_that_of_one_look(bad: float, shared: float) -> None:
    """A hundred looks at the same records, which move all of them together; bad candidates lie on the line itself."""
    random, years, nights = np.random.default_rng(0), 4000, 100
    is_bad = random.random((years, nights)) < bad
    noise = np.sqrt(shared) * random.standard_normal((years, 1))
    seen = noise + np.sqrt(1 - shared) * random.standard_normal((years, nights)) + np.where(is_bad, 0.0, 4.0)
    passed, wrong = np.zeros(years, int), np.zeros(years, int)
    for night in range(nights):
        counts, place = np.unique(passed, return_inverse=True)
        levels = norm.ppf([confidence_at(night + 1, 0.95, int(each)) for each in counts])
        passes_now = seen[:, night] > levels[place]
        passed += passes_now
        wrong += passes_now & is_bad[:, night]
    share = wrong / np.maximum(passed, 1)
    assert share.mean() <= ALPHA + 3 * share.std() / np.sqrt(years)


def test_what_took_the_place_of_another_by_the_gate_on_these_records_is_counted(store: Store) -> None:
    def moved(run_id: str, kind: str = "promoted", before: str | None = "v0", test_set: str = "a") -> Event:
        evidence = {"test_set": [test_set], "sha256": "0"} if run_id else {}
        body = {"alias": "production", "run_id": run_id, "from": before, "to": f"v-{run_id}", "evidence": evidence}
        return append_event(store, "icd", kind, {**body, "manifest_sha256": "0", "reason": ""})

    moved("first", before=None)  # there was none whose place it took
    for run_id in ("second", "third", "now"):
        moved(run_id)
    moved("elsewhere", test_set="b")
    moved("", kind="overridden")  # by a person
    append_event(store, "icd", "refused", {"alias": "production", "run_id": "held", "test_set": ["a"]})
    log = events(store, "icd")
    assert len(decided_before(log, "production", ["a"], run_id="now")) == 4
    replaced = decided_before(log, "production", ["a"], run_id="now", replaced=True)
    assert [event.body["run_id"] for event in replaced] == ["second", "third"]
    not_third = partial(decided_before, counts=lambda event: event.body["run_id"] != "third")
    assert len(not_third(log, "production", ["a"], run_id="now", replaced=True)) == 1


def test_an_event_is_written_once_and_the_log_is_ordered(store: Store) -> None:
    early, late = "2026-01-01T00:00:00.000000Z", "2026-01-01T00:00:01.000000Z"
    for time in (late, early):  # filed twice at once
        append_event(store, "icd", "refused", {"run_id": "r1"}, at=time)
    assert [event.time for event in events(store, "icd")] == [early]
    before = {info.key: info.last_modified for info in store.list("")}
    assert append_event(store, "icd", "refused", {"run_id": "r1"}) in map(store.uri, before)
    assert {info.key: info.last_modified for info in store.list("")} == before
    append_event(store, "icd", "refused", {"run_id": "r0"})
    assert [event.body["run_id"] for event in events(store, "icd")] == ["r1", "r0"]
