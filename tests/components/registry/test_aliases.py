import pickle

import pytest

from components.registry.aliases import Cause, list_aliases, move_alias, promote, read_alias, rollback
from components.registry.audit import audit
from components.registry.event_log import append_event, events
from components.registry.versions import resolve
from components.shared.errors import AliasConflict, IntegrityError, ObjectMissing, UserError
from components.store.store import Store
from tests.components.registry.adapters import holder, moves


def test_a_promotion_moves_the_alias_and_logs_who_and_why(store: Store, versions: list[str]) -> None:
    one, two, _ = versions
    assert promote(store, "icd", one, expected=None).move()["from"] is None
    cause = Cause("r2", actor="ann", reason="better", evidence={"loss": [1.0, 0.5]})
    event = promote(store, "icd", two, expected=one, cause=cause)
    pointer = read_alias(store, "icd", "production")
    assert pointer is not None
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


def test_a_promotion_against_another_champion_is_a_conflict_that_says_who_holds_it(
    store: Store, versions: list[str]
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    promote(store, "icd", two, cause=Cause("r2"))
    for expected in (one, None):
        with pytest.raises(
            AliasConflict, match=f"held by {expected or 'no version'}, but it is held by {two} .*run r2"
        ) as raised:
            promote(store, "icd", three, expected=expected)
        pointer = read_alias(store, "icd", "production")
        assert pointer is not None
        holds = {"alias": "production", "version": two, "since": pointer.since, "run_id": "r2"}
        assert raised.value.as_json()["conflict"] == holds
        assert pickle.loads(pickle.dumps(raised.value)).holder == raised.value.holder  # noqa: S301
    assert holder(store) == two
    assert moves(store)[-1] == ("promoted", one, two)


def test_a_move_from_a_pointer_that_has_moved_is_a_conflict(store: Store, versions: list[str]) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    stale = read_alias(store, "icd", "production")
    promote(store, "icd", two)
    for expected in (stale, None):
        with pytest.raises(AliasConflict) as raised:
            move_alias(store, "icd", "production", three, expected=expected, kind="promoted", cause=Cause("r"))
        assert raised.value.holder is not None
        assert raised.value.holder["version"] == two
    assert holder(store) == two


def test_an_alias_that_returned_to_an_earlier_version_is_not_mistaken_for_unmoved(
    store: Store, versions: list[str]
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    stale = read_alias(store, "icd", "production")
    promote(store, "icd", two)
    rollback(store, "icd")
    assert holder(store) == one
    with pytest.raises(AliasConflict, match=f"was moved meanwhile, and is held by {one} .* again"):
        move_alias(store, "icd", "production", three, expected=stale, kind="promoted", cause=Cause())


def test_a_version_that_holds_the_alias_already_is_as_expected_only_if_it_came_from_there(
    store: Store, versions: list[str]
) -> None:
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
    assert [(pointer.alias, pointer.version) for pointer in list_aliases(store, "icd")] == [
        ("production", one),
        ("staging", two),
    ]


def test_a_clock_that_is_behind_does_not_reorder_the_moves(
    store: Store, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = versions
    promote(store, "icd", one)
    promote(store, "icd", two)
    monkeypatch.setattr("components.registry.aliases.now", lambda: "2001-01-01T00:00:00.000000Z")
    promote(store, "icd", three)
    assert moves(store)[-1] == ("promoted", two, three)
    assert rollback(store, "icd").body["to"] == two


def test_the_log_is_ordered_and_never_rewritten(store: Store, versions: list[str]) -> None:
    refused = append_event(store, "icd", "refused", {"version": versions[0], "run_id": "r1"})
    promote(store, "icd", versions[0])
    body = store.get(store.key(refused))
    before = {info.key: info.last_modified for info in store.list("adapters/icd/events/")}
    assert append_event(store, "icd", "refused", {"version": versions[0], "run_id": "r1"}) == refused
    assert {info.key: info.last_modified for info in store.list("adapters/icd/events/")} == before
    assert store.get(store.key(refused)) == body
    append_event(store, "icd", "refused", {"version": versions[0], "run_id": "r2"})
    log = events(store, "icd")
    assert [event.kind for event in log] == ["published"] * 3 + ["refused", "promoted", "refused"]
    assert [event.time for event in log] == sorted(event.time for event in log)
    assert len({event.id for event in log}) == len(log)


def test_an_event_filed_twice_at_once_is_read_once(store: Store) -> None:
    early, late = "2026-01-01T00:00:00.000000Z", "2026-01-01T00:00:01.000000Z"
    for time in (late, early):
        append_event(store, "icd", "refused", {"run_id": "r1"}, at=time)
    assert [event.time for event in events(store, "icd")] == [early]


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
        b"3",
        b'{"version": "v1"}',
        b'{"format": 1, "other": 2}',
        b"[" * 100_000,
        SOUND.replace('"v1", "m', '3, "m').encode(),
        SOUND.replace("2026-01", "2026-21").encode(),
        SOUND.replace('"promoted"', '"moved"').encode(),
        SOUND.replace('{"from": null, "to": "v1"}', '{"to": "v1"}').encode(),
        SOUND.replace('{"from": null, "to": "v1"}', "[]").encode(),
    ],
    ids=range(11),
)
def test_a_damaged_pointer_is_named(store: Store, body: bytes) -> None:
    store.put("adapters/icd/aliases/production.json", SOUND.encode())
    assert read_alias(store, "icd", "production")
    store.put("adapters/icd/aliases/production.json", body)
    with pytest.raises(IntegrityError, match=r"aliases/production\.json"):
        read_alias(store, "icd", "production")


JUNK = [b"", b"[1]", b"3", b"\xff", b"[" * 100_000, b'{"id": "a", "kind": "promoted", "time": "2026", "body": {}}']


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_what_is_no_event_is_named_and_stops_no_move(
    store: Store, versions: list[str], junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = versions
    store.put("adapters/icd/events/2026-x.json", junk)
    promote(store, "icd", one, cause=Cause("r1"))
    promote(store, "icd", two, cause=Cause("r2"))
    promote(store, "icd", three, cause=Cause("r3"))
    assert "events/2026-x.json is not an event, and passed over" in caplog.text
    assert rollback(store, "icd").body["to"] == two
    assert rollback(store, "icd").body["to"] == one
    assert len(moves(store)) == 5


END_OF_TIME = "9999-12-31T23:59:59.999999Z"


@pytest.mark.parametrize("since", [END_OF_TIME, "9999-01-01T00:00:00.000000Z", "0001-01-01T00:00:00+14:00"])
def test_an_alias_of_a_clock_far_off_moves_and_goes_back(store: Store, versions: list[str], since: str) -> None:
    one, two, three = versions
    for version in (one, two):
        promote(store, "icd", version)
    key = "adapters/icd/aliases/production.json"
    store.put_json(key, {**store.get_json(key), "since": since})
    promote(store, "icd", three)
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
