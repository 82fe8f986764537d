"""Whoever may write a cache may slow a registry down, and change nothing that is decided by it.

The judge is what is read without it; forged entries are packed here, with plain gzip and json.
"""

import gzip
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.promote import promote as by_hand
from components.registry import aliases, cache, collect, event_log, versions
from components.registry.aliases import list_aliases, promote, rollback
from components.registry.collect import all_adapters
from components.registry.event_log import decided_before, is_held
from components.registry.versions import list_adapters, list_versions, made_from
from components.report.registry_page import write_pages
from components.shared.errors import ObjectMissing, StoreError, UserError
from components.store.store import BINARY, Store
from tests.components.registry.adapters import published, requests_of

NUMBER = 15
INDEX = "adapters/icd/index/adapter.json.gz"
TEST_SET = ["a", "b"]


@pytest.fixture
def refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version that the gate refused as often as an index is made for."""
    monkeypatch.setattr(event_log, "WORTH_AN_INDEX", NUMBER)  # of the events that follow and the one of the version
    version = published(store, b"1", run_id="r").version
    for number in range(NUMBER):
        body = {"version": version, "alias": "production", "run_id": f"r{number}", "test_set": TEST_SET}
        event_log.append_event(store, "icd", "refused", body, at=f"2026-01-01T00:00:00.{number:06}Z")
    event_log.events(store, "icd")
    return version


def forge(store: Store, section: str, change: Callable[[str, Any], Any]) -> None:
    """Put what `change` makes of each entry in its place."""
    index = json.loads(gzip.decompress(store.get(INDEX)))
    index[section] = {name: change(name, entry) for name, entry in index[section].items()}
    store.put(INDEX, gzip.compress(json.dumps(index).encode()))


def as_promoted(_name: str, entry: str) -> str:
    """An event that never was, with the id that its content has."""
    record = json.loads(entry)
    version, run_id = record["body"]["version"], record["body"].get("run_id")
    body = {"alias": "production", "from": None, "to": version, "manifest_sha256": "0" * 64, "run_id": run_id}
    content = json.dumps(["promoted", body], sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps({**record, "kind": "promoted", "id": sha256[:12], "body": body})


def as_later(_name: str, entry: str) -> str:
    return entry.replace('"2026', '"2030')


def as_worded_otherwise(_name: str, entry: str) -> str:
    """Its name is what it should be; as if somebody had found another content of the same twelve digits."""
    return json.dumps({**json.loads(entry), "adapter": "other"})


@pytest.mark.parametrize(
    "change", [as_promoted, as_later, as_worded_otherwise, lambda _name, _entry: 1e999, lambda _name, _entry: [None]]
)
def test_a_forged_event_is_read_again_from_the_log(store: Store, refused: str, change: Callable[..., Any]) -> None:
    forge(store, "events", change)
    log = event_log.events(store, "icd")
    assert log == event_log.read_log(store, "icd")[0]
    assert len(decided_before(log, "production", TEST_SET, run_id="next")) == NUMBER
    assert is_held(log, refused, "production")
    forge(store, "events", change)
    with pytest.raises(UserError, match="the gate holds icd"):
        by_hand.promote_by_hand(store, f"icd@{refused}", by_hand.Person())


def test_a_sound_index_spares_the_reading(store: Store, refused: str) -> None:
    sent = requests_of(store)
    assert len(event_log.events(store, "icd")) == NUMBER + 1
    assert len(sent) < NUMBER


def test_no_forged_date_makes_a_version_the_newest(store: Store) -> None:
    made = [published(store, b"%d" % number).version for number in range(5)]
    versions.list_versions(store, "icd")
    forge(store, "versions", lambda _name, entry: {**entry, "settled": True})
    later = {"created_at": "2030-01-01T00:00:00.000000Z"}
    forge(store, "versions", lambda name, entry: {**entry, **(later if name == made[0] else {})})
    assert versions.list_versions(store, "icd")[0].version == made[0]  # shown, and no more than that
    event = by_hand.carry_out(store, "icd", by_hand.PROMOTE, by_hand.Person(), alias="production", run_id="j1")
    assert event.body["to"] == made[-1]
    assert versions.resolve(store, f"icd@{made[0][:12]}").created_at < "2030"
    for junk in (5, {"a": 1}, {"settled": True, "made_from": 5}):
        forge(store, "versions", lambda _name, _entry, junk=junk: junk)
        assert [each.version for each in versions.list_versions(store, "icd")] == made[::-1]
    assert made_from(store, "icd") == dict.fromkeys(made, ())
    assert aliases.read_alias(store, "icd", "production") is not None


NAMES = ("icd", "other")


def publish(store: Store, name: str, weights: bytes) -> str:
    return published(store, weights, name=name, run_id=weights.hex()).version


@pytest.fixture
def made(store: Store) -> dict[str, list[str]]:
    """Two adapters with three versions each, the second of which is in production."""
    ids = {name: [publish(store, name, f"{name} {number}".encode()) for number in range(3)] for name in NAMES}
    for name, (_, second, _) in ids.items():
        promote(store, name, second)
    return ids


def judged(store: Store) -> dict[str, tuple[str | None, int, dict[str, str]]]:
    found = {}
    for name in list_adapters(store):
        versions = list_versions(store, name)
        held = {each.alias: each.version for each in list_aliases(store, name)}
        found[name] = (versions[0].version if versions else None, len(versions), held)
    return found


def listed(store: Store) -> dict[str, tuple[str | None, int, dict[str, str]]]:
    return {name: (each.newest, each.versions, each.aliases) for name, each in all_adapters(store).items()}


@pytest.fixture
def sent(store: Store) -> list[str]:
    return requests_of(store)


def reads(sent: list[str], name: str) -> bool:
    return any(f"adapters/{name}/" in address or f"adapters%2F{name}%2F" in address for address in sent)


def test_a_list_reads_what_changed_alone(store: Store, made: dict[str, list[str]], sent: list[str]) -> None:
    def collected() -> None:
        rules = collect.Rules(keep_last=0, older_than=timedelta(0))
        removals = collect.removals(store, ["icd"], rules, now=datetime.now(UTC))
        assert all([collect.remove(store, each) for each in removals])

    changes: dict[str, Callable[[], Any]] = {
        "a promotion": lambda: promote(store, "icd", made["icd"][2]),
        "a promotion to another alias": lambda: promote(store, "icd", made["icd"][1], "staging"),
        "a rollback": lambda: rollback(store, "icd", to=made["icd"][1]),
        "a publication": lambda: publish(store, "icd", b"new"),
        "a version trained again": lambda: (publish(store, "icd", b"n"), published(store, b"icd 0", run_id="another")),
        "a new adapter": lambda: publish(store, "icd-10", b"first"),
        "a collection": collected,
    }
    before = listed(store)
    assert before == judged(store)
    for what, change in changes.items():
        change()
        after = judged(store)
        assert after != before, what
        sent.clear()
        assert listed(store) == after, what
        assert reads(sent, "icd") != reads(sent, "icd-10"), what
        assert not reads(sent, "other"), what
        sent.clear()
        assert listed(store) == after, what
        assert not any(reads(sent, name) for name in (*NAMES, "icd-10")), what
        before = after


def test_the_report_of_a_run_writes_its_adapters_line_and_a_list_after_it_reads_no_adapter(
    store: Store, made: dict[str, list[str]], sent: list[str]
) -> None:
    assert listed(store) == judged(store)
    promote(store, "icd", made["icd"][2])
    write_pages(store, "icd", generated_at="now")
    sent.clear()
    found = listed(store)
    assert not any(reads(sent, name) for name in NAMES)
    assert found == judged(store)
    entry = store.get_json(cache.LISTED)["icd"]
    assert (entry["in_production"], entry[cache.LISTING]["aliases"]) == (made["icd"][2], {"production": made["icd"][2]})


@pytest.mark.parametrize("at", [f"{cache.CHANGED}icd", "adapters/icd/events/", "adapters/icd/aliases/"])
def test_a_writer_that_dies_leaves_no_wrong_list_though_another_lists_meanwhile(
    store: Store, made: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It dies when it writes a key that begins so; before that, and before an alias moves, the other one lists."""

    def write(real: Callable[..., Any], key: str, body: bytes, *more: Any, **options: Any) -> Any:
        dies = key.startswith(at) and not body.startswith(b"being")
        if dies or key.startswith("adapters/icd/aliases/"):
            listed(store)
        if dies:
            raise KeyboardInterrupt
        return real(key, body, *more, **options)

    assert listed(store) == judged(store)
    killed = Store(store._client, store.bucket, store.prefix)
    for method in ("put", "create", "swap"):
        monkeypatch.setattr(killed, method, partial(write, getattr(killed, method)))
    with pytest.raises(KeyboardInterrupt):
        promote(killed, "icd", made["icd"][2])
    for _ in range(2):
        assert listed(store) == judged(store)
    promote(store, "icd", made["icd"][2])
    assert listed(store) == judged(store)


def test_a_reader_that_was_overtaken_keeps_nothing_old(store: Store, made: dict[str, list[str]]) -> None:
    """Another run reads the adapter, and writes what it read once this one has moved the alias and told so."""

    class Slow(Store):
        moves = True

        def swap(self, key: str, body: bytes, etag: str, *, content_type: str = BINARY) -> str:
            if key == cache.LISTED and self.moves:
                self.moves = False
                promote(store, "icd", made["icd"][2])
                write_pages(store, "icd", generated_at="now")
                assert listed(store) == judged(store)
            return super().swap(key, body, etag, content_type=content_type)

    assert listed(store) == judged(store)
    promote(store, "other", made["other"][2])
    slow = Slow(store._client, store.bucket, store.prefix)
    assert listed(slow)["other"] == judged(store)["other"]
    assert listed(store) == judged(store)
    slow.moves = True
    write_pages(slow, "other", generated_at="now")
    assert listed(store) == judged(store)


def test_a_list_that_is_damaged_is_made_anew(store: Store, made: dict[str, list[str]]) -> None:
    truth = judged(store)
    assert listed(store) == truth
    entries = [5, {}, {cache.LISTING: {"newest": 5}}, {cache.LISTING: []}]
    for damaged in (None, [], {}, *({"icd": entry} for entry in entries)):
        store.put_json(cache.LISTED, damaged)
        assert listed(store) == truth, damaged
        assert store.get_json(cache.LISTED).keys() == {*NAMES}, damaged
    store.put(cache.LISTED, b"[" * 100_000)
    assert listed(store) == truth


def test_who_may_write_no_list_still_reads_a_true_one(store: Store, made: dict[str, list[str]]) -> None:
    class Reader(Store):
        def put(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> None:
            raise StoreError("no permission")

        create = swap = put  # type: ignore[assignment]

    reader = Reader(store._client, store.bucket, store.prefix)
    assert listed(reader) == judged(store)
    with cache.changing(reader, "icd"):
        pass
    with pytest.raises(ObjectMissing):
        store.get(cache.LISTED)


def test_the_newest_is_read_beneath_what_is_no_publication(store: Store, made: dict[str, list[str]]) -> None:
    store.put("adapters/icd/events/9999-ffffffffffff.json", b"junk")
    assert listed(store)["icd"] == judged(store)["icd"]
