import hashlib
import json
import pickle
from dataclasses import replace

import pytest

from components.registry.aliases import Cause, list_aliases, move_alias, promote, read_alias, rollback
from components.registry.audit import audit
from components.registry.event_log import append_event, events, is_chain, publication
from components.registry.versions import resolve
from components.shared.errors import AliasConflict, IntegrityError, ObjectMissing, UserError
from components.store.folders import find_manifest
from components.store.store import Store
from tests.components.registry.adapters import holder, moves


def test_a_promotion_moves_the_alias_and_logs_who_and_why(store: Store, versions: list[str]) -> None:
    one, two, _ = versions
    assert promote(store, "icd", one, expected=None).move()["from"] is None
    cause = Cause("r2", actor="ann", reason="better", evidence={"loss": [1.0, 0.5]})
    event = promote(store, "icd", two, expected=one, cause=cause)
    pointer = read_alias(store, "icd", "production")
    assert (pointer.version, pointer.run_id, pointer.kind, pointer.since) == (two, "r2", "promoted", event.time)
    assert event.move() == {"alias": "production", "from": one, "to": two, "event_uri": event.uri}
    assert events(store, "icd")[-1] == event
    about = {"actor": "ann", "reason": "better", "evidence": {"loss": [1.0, 0.5]}}
    assert {**about, "run_id": "r2", "manifest_sha256": pointer.manifest_sha256}.items() <= event.body.items()
    before = {info.key: info.last_modified for info in store.list("")}
    assert promote(store, "icd", two, expected=one, cause=cause) == event
    assert {info.key: info.last_modified for info in store.list("")} == before
    store.delete([store.key(event.uri)])  # as one that was killed before it
    assert promote(store, "icd", two, expected=one, cause=cause) == event
    assert events(store, "icd")[-1] == event


def test_a_promotion_against_another_champion_is_a_conflict_that_names_the_holder(
    store: Store, versions: list[str]
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    promote(store, "icd", two, cause=Cause("r2"))
    for expected in (one, None):
        message = f"held by {expected or 'no version'}, but it is held by {two} .*run r2"
        with pytest.raises(AliasConflict, match=message) as raised:
            promote(store, "icd", three, expected=expected)
        pointer = read_alias(store, "icd", "production")
        holds = {"alias": "production", "version": two, "since": pointer.since, "run_id": "r2"}
        assert raised.value.as_json()["conflict"] == holds
        assert pickle.loads(pickle.dumps(raised.value)).holder == raised.value.holder  # noqa: S301
    assert holder(store) == two
    assert moves(store)[-1] == ("promoted", one, two)


def test_an_alias_that_returned_to_an_earlier_version_has_moved(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    stale = read_alias(store, "icd", "production")
    promote(store, "icd", two)
    rollback(store, "icd")
    assert holder(store) == one
    with pytest.raises(AliasConflict, match=f"was moved meanwhile, and is held by {one} .* again"):
        move_alias(store, "icd", "production", three, expected=stale, kind="promoted", cause=Cause())


def test_promoting_the_holder_again_asks_where_it_came_from(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    event = promote(store, "icd", two, expected=one)
    for expected in (one, two):  # the same move again, and one that need not be made
        assert promote(store, "icd", two, expected=expected) == event
    for expected in (three, "vdead", None):
        with pytest.raises(AliasConflict, match=f"is held by {two} .*: nothing is moved$"):
            promote(store, "icd", two, expected=expected)
    assert promote(store, "icd", two, expected=three, cause=Cause("r3")) == event  # of two runs of one training


def test_a_promotion_killed_before_its_event_is_completed_by_the_next_move(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    event = promote(store, "icd", two)
    store.delete([store.key(event.uri)])
    promote(store, "icd", three)
    assert moves(store) == [("promoted", None, one), ("promoted", one, two), ("promoted", two, three)]
    event = promote(store, "icd", one)
    store.delete([store.key(event.uri)])
    rollback(store, "icd")
    assert holder(store) == three


def test_aliases_move_independently(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    promote(store, "icd", two, "staging")
    promote(store, "icd", three, "staging")
    promote(store, "icd", three)
    assert rollback(store, "icd", "staging").body["to"] == two
    assert rollback(store, "icd").body["to"] == one
    found = [(pointer.alias, pointer.version) for pointer in list_aliases(store, "icd")]
    assert found == [("production", one), ("staging", two)]


def test_an_unknown_version_or_a_bad_name_moves_nothing(store: Store, versions: list[str]) -> None:
    with pytest.raises(ObjectMissing, match="v000000000000000 does not exist"):
        promote(store, "icd", "v000000000000000")
    with pytest.raises(UserError, match="alias 'Production' is not allowed"):
        promote(store, "icd", versions[0], "Production")
    with pytest.raises(UserError, match=r"adapter name '\.\./icd' is not allowed"):
        promote(store, "../icd", versions[0])
    assert read_alias(store, "icd", "production") is None


SOUND = (
    '{"format": 1, "version": "v1", "manifest_sha256": "a", "since": "2026-01-01T00:00:00Z", "run_id": "", '
    '"kind": "promoted", "event": {"from": null, "to": "v1"}}'
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b'{"version": "v1"}',
        b'{"format": 1, "other": 2}',
        b"[" * 100_000,
        SOUND.replace('"v1", "m', '3, "m').encode(),
        SOUND.replace("2026-01", "2026-21").encode(),
        SOUND.replace('"promoted"', '"moved"').encode(),
        SOUND.replace('{"from": null, "to": "v1"}', '{"to": "v1"}').encode(),
        SOUND.replace('{"from": null, "to": "v1"}', "[]").encode(),
    ],
    ids=range(10),
)
def test_a_damaged_pointer_is_named(store: Store, body: bytes) -> None:
    store.put("adapters/icd/aliases/production.json", SOUND.encode())
    assert read_alias(store, "icd", "production")
    store.put("adapters/icd/aliases/production.json", body)
    with pytest.raises(IntegrityError, match=r"aliases/production\.json"):
        read_alias(store, "icd", "production")


JUNK = [b"", b"[1]", b"3", b"\xff", b"[" * 100_000, b'{"id": "a", "kind": "promoted", "time": "2026", "body": {}}']


def test_junk_among_the_events_stops_no_move(
    store: Store, versions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = versions
    for number, junk in enumerate(JUNK):
        store.put(f"adapters/icd/events/2026-{number}.json", junk)
    promote(store, "icd", one, cause=Cause("r1"))
    promote(store, "icd", two, cause=Cause("r2"))
    promote(store, "icd", three, cause=Cause("r3"))
    for number in range(len(JUNK)):
        assert f"events/2026-{number}.json is not an event, and passed over" in caplog.text
    assert rollback(store, "icd").body["to"] == two
    assert rollback(store, "icd").body["to"] == one
    assert len(moves(store)) == 5


END_OF_TIME = "9999-12-31T23:59:59.999999Z"


# The second one is that of a clock ahead of ours, after which the moves have to sort all the same.
@pytest.mark.parametrize("since", [END_OF_TIME, "9999-01-01T00:00:00.000000Z", "0001-01-01T00:00:00+14:00"])
def test_an_alias_of_a_clock_far_off_moves_and_goes_back(store: Store, versions: list[str], since: str) -> None:
    one, two, three = versions
    for version in (one, two):
        promote(store, "icd", version)
    key = "adapters/icd/aliases/production.json"
    store.put_json(key, {**store.get_json(key), "since": since})
    assert promote(store, "icd", three).time >= since or since.startswith("0001")
    if since != END_OF_TIME:  # after which no time is later, so that the names of the two moves order them
        assert moves(store)[-1] == ("promoted", two, three)
    assert [rollback(store, "icd").body["to"], rollback(store, "icd").body["to"]] == [two, one]
    assert holder(store) == one


def test_junk_among_the_aliases_is_passed_over_but_where_it_is_asked_for(store: Store, versions: list[str]) -> None:
    promote(store, "icd", versions[0])
    for junk in ("staging.json", "NOT A NAME.json", "notes.txt"):
        store.put(f"adapters/icd/aliases/{junk}", b"junk")
    assert [pointer.alias for pointer in list_aliases(store, "icd")] == ["production"]
    with pytest.raises(IntegrityError, match=r"staging\.json is not JSON"):
        list_aliases(store, "icd", pass_over_damaged=False)
    assert resolve(store, "icd").version == versions[0]
    for reference in (f"icd@{versions[1][:12]}", f"icd@{versions[1]}"):
        assert resolve(store, reference).version == versions[1]
    with pytest.raises(IntegrityError, match=r"staging\.json is not JSON"):
        resolve(store, "icd@staging")
    found = {finding.where.rpartition("/")[2] for finding in audit(store, "icd").findings}
    assert found == {"staging.json", "NOT A NAME.json", "notes.txt"}


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


@pytest.mark.parametrize("damage", ["rewritten", "forged", "deleted"])
def test_a_rollback_reads_the_move_that_it_returns_to(store: Store, versions: list[str], damage: str) -> None:
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
    append_event(store, "icd", "published", publication(one, manifest), at=manifest.created_at)
    for to in (None, one):
        with pytest.raises(IntegrityError, match="vouched for"):
            rollback(store, "icd", to=to)
    assert holder(store) == two


def test_moves_name_the_one_before_them_by_sha256(store: Store, versions: list[str]) -> None:
    logged = [promote(store, "icd", version) for version in versions] + [rollback(store, "icd")]
    # hashlib and json as anybody has them, over the bytes as they are stored
    stored = [json.loads(store.get(store.key(event.uri))) for event in logged]
    as_written = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    bodies = [json.dumps([each["kind"], each["body"]], **as_written) for each in stored]
    digests = [hashlib.sha256(body.encode()).hexdigest() for body in bodies]
    assert [each["body"]["previous"] and each["body"]["previous"]["sha256"] for each in stored] == [None, *digests[:-1]]
    assert stored[-1]["body"]["beneath"]["sha256"] == digests[0]  # one move was rolled back: the next goes below it
    assert is_chain(logged)
    assert not is_chain(logged[1:])
    assert not is_chain([logged[0], *logged[2:]])
    assert not is_chain([replace(logged[0], body={**logged[0].body, "actor": "eve"}), *logged[1:]])


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


def test_rolling_back_to_what_a_gate_refused_is_an_override(store: Store, versions: list[str]) -> None:
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
