"""Back to the version before, and what the log has to say for it."""

import hashlib
import json
from dataclasses import replace

import pytest

from components.registry.aliases import Cause, promote, rollback
from components.registry.event_log import append_event, is_chain, publication
from components.shared.errors import AliasConflict, IntegrityError, ObjectMissing
from components.store.folders import find_manifest
from components.store.store import Store
from tests.components.registry.adapters import holder, moves, requests_of


def test_a_run_that_was_rolled_back_does_not_promote_again(store: Store, versions: list[str]) -> None:
    one, two, _ = versions
    promote(store, "icd", one)
    promote(store, "icd", two, expected=one, cause=Cause("r2"))
    rollback(store, "icd", cause=Cause(actor="ann"))
    with pytest.raises(AliasConflict, match="run r2 promoted it at"):
        promote(store, "icd", two, expected=one, cause=Cause("r2"))
    assert holder(store) == one
    promote(store, "icd", two, expected=one, cause=Cause("r3"))
    assert holder(store) == two


def test_a_rollback_stands_on_the_evidence_of_the_move_that_it_returns_to(store: Store, versions: list[str]) -> None:
    one, _, three = versions
    stood_on = [{"anchor": one}, {"anchor": one, "sha256": "2"}, {"anchor": three}]
    for version, evidence in zip(versions, stood_on, strict=True):
        promote(store, "icd", version, cause=Cause(evidence=evidence))
    assert rollback(store, "icd", cause=Cause(actor="ann")).body["evidence"] == stood_on[1]
    assert rollback(store, "icd", to=three).body["evidence"] == {}  # nobody rolls back to where it was rolled back from
    assert rollback(store, "icd", to=one).body["evidence"] == stood_on[0]


def test_rollbacks_go_back_one_holder_at_a_time(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    for version in versions:
        promote(store, "icd", version)
    event = rollback(store, "icd", cause=Cause(actor="ann", reason="wrong answers"))
    assert event.kind == "rolled_back"
    assert event.move() == {"alias": "production", "from": three, "to": two, "event_uri": event.uri}
    assert rollback(store, "icd").body["to"] == one
    with pytest.raises(ObjectMissing, match=f"nothing held icd@production before {one}"):
        rollback(store, "icd")
    assert holder(store) == one
    promote(store, "icd", three)
    assert rollback(store, "icd").body["to"] == one
    assert [kind for kind, _, _ in moves(store)] == ["promoted"] * 3 + ["rolled_back"] * 2 + ["promoted", "rolled_back"]


def test_a_rollback_to_a_named_version_goes_there(store: Store, versions: list[str]) -> None:
    one, _, three = versions
    for version in versions:
        promote(store, "icd", version)
    assert rollback(store, "icd", to=one).move()["from"] == three
    assert holder(store) == one
    with pytest.raises(ObjectMissing):
        rollback(store, "icd", to="v000000000000000")
    with pytest.raises(ObjectMissing, match="no alias 'staging' to roll back"):
        rollback(store, "icd", "staging")


def test_a_rollback_goes_where_the_pointer_says_whatever_was_added_to_the_log(
    store: Store, versions: list[str]
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    promote(store, "icd", two)
    forged = {"alias": "production", "from": one, "to": three, "manifest_sha256": "", "run_id": "", "since": "2999"}
    append_event(store, "icd", "promoted", forged, at="2999-01-01T00:00:00.000000Z")
    assert rollback(store, "icd").body["to"] == one


@pytest.mark.parametrize("damage", ["rewritten", "forged", "deleted"])
def test_each_rollback_reads_the_move_that_it_returns_to_and_no_other(
    store: Store, versions: list[str], damage: str
) -> None:
    one, two, three = versions
    logged = [promote(store, "icd", version) for version in versions]
    rollback(store, "icd")
    key = store.key(logged[0].uri)
    if damage == "rewritten":
        store.put(key, store.get(key).replace(one.encode(), three.encode()))
    elif damage == "deleted":
        store.delete([key])
    else:
        append_event(store, "icd", "promoted", {**logged[0].body, "to": three}, at=logged[0].time)
        assert rollback(store, "icd").body["to"] == one
        return
    with pytest.raises(IntegrityError, match=r"a later .* names.*name the version to go back to with --to"):
        rollback(store, "icd")
    assert holder(store) == two
    assert rollback(store, "icd", to=one).body["to"] == one


def test_a_rollback_returns_to_the_very_manifest_that_held_the_alias(store: Store, versions: list[str]) -> None:
    """Not to one that somebody put there since, with an event that says it was published so."""
    one, two, _ = versions
    promote(store, "icd", one)
    promote(store, "icd", two)
    key = f"adapters/icd/versions/{one}"
    store.put(f"{key}/manifest.json", store.get(f"{key}/manifest.json").replace(b'"run_id":"r0"', b'"run_id":"r9"'))
    manifest = find_manifest(store, key)
    assert manifest is not None
    append_event(store, "icd", "published", publication(one, manifest), at=manifest.created_at)
    for to in (None, one):
        with pytest.raises(IntegrityError, match="vouched for"):
            rollback(store, "icd", to=to)
    assert holder(store) == two


def test_moves_name_the_one_before_them_by_sha256(store: Store, versions: list[str]) -> None:
    logged = [promote(store, "icd", version) for version in versions] + [rollback(store, "icd")]
    # hashlib and json as anybody has them, over the bytes as they are stored
    stored = [json.loads(store.get(store.key(event.uri))) for event in logged]
    digests = [
        hashlib.sha256(
            json.dumps([each["kind"], each["body"]], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        ).hexdigest()
        for each in stored
    ]
    assert [each["body"]["previous"] and each["body"]["previous"]["sha256"] for each in stored] == [None, *digests[:-1]]
    assert stored[-1]["body"]["beneath"]["sha256"] == digests[0]  # one move was rolled back: the next goes below it
    assert is_chain(logged)
    assert not is_chain(logged[1:])
    assert not is_chain([logged[0], *logged[2:]])
    assert not is_chain([replace(logged[0], body={**logged[0].body, "actor": "eve"}), *logged[1:]])


def test_a_rollback_takes_as_many_requests_after_many_moves_as_after_few(store: Store, versions: list[str]) -> None:
    one, two, _ = versions
    sent = requests_of(store)
    counts = []
    for moved in (2, 10):
        for number in range(moved):
            promote(store, "icd", (one, two)[number % 2])
        sent.clear()
        rollback(store, "icd")
        counts.append(len(sent))
        promote(store, "icd", two)
    assert counts[0] == counts[1] <= 14


def test_a_rollback_that_names_the_holder_can_be_sent_again(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    for version in versions:
        promote(store, "icd", version)
    event = rollback(store, "icd", expected=three)
    assert rollback(store, "icd", expected=three) == event  # after an answer that was lost
    assert holder(store) == two
    with pytest.raises(AliasConflict, match=f"expected to be held by {one}, but it is held by {two}"):
        rollback(store, "icd", expected=one)
    event = rollback(store, "icd", expected=two, cause=Cause("r9"))
    assert rollback(store, "icd", cause=Cause("r9")) == event
    assert holder(store) == one


def test_rolling_back_to_what_a_gate_refused_and_nobody_promoted_is_an_override(
    store: Store, versions: list[str]
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    for version in (two, three):
        append_event(store, "icd", "refused", {"version": version, "alias": "production", "run_id": "r"})
    event = rollback(store, "icd", to=two, expected=one)
    assert event.kind == "overridden"
    assert rollback(store, "icd", to=two, expected=one) == event
    promote(store, "icd", one)
    assert rollback(store, "icd", to=two).kind == "rolled_back"
    assert rollback(store, "icd").body["to"] == one
