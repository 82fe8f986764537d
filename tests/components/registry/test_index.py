"""Whoever may write the index may slow a registry down, and change nothing that is decided by it.

The judge is what `read_log` finds in the objects themselves; forged entries are packed here, with plain gzip and json.
"""

import gzip
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from components.promote import promote
from components.registry import aliases, event_log, versions
from components.registry.event_log import decided_before, is_held
from components.registry.versions import made_from
from components.shared.errors import UserError
from components.store.store import Store
from tests.components.registry.adapters import published, requests_of

NUMBER = 105
INDEX = "adapters/icd/index/adapter.json.gz"
TEST_SET = ["a", "b"]


@pytest.fixture
def refused(store: Store) -> str:
    """A version that the gate refused as often as an index is made for."""
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
        promote.promote_by_hand(store, f"icd@{refused}", promote.Person())


def test_a_sound_index_spares_the_reading(store: Store, refused: str) -> None:
    sent = requests_of(store)
    assert len(event_log.events(store, "icd")) == NUMBER + 1
    assert len(sent) == 2


def test_no_forged_date_makes_a_version_the_newest(store: Store) -> None:
    made = [published(store, b"%d" % number).version for number in range(NUMBER)]
    versions.list_versions(store, "icd")
    forge(store, "versions", lambda _name, entry: {**entry, "settled": True})
    later = {"created_at": "2030-01-01T00:00:00.000000Z"}
    forge(store, "versions", lambda name, entry: {**entry, **(later if name == made[0] else {})})
    assert versions.list_versions(store, "icd")[0].version == made[0]  # shown, and no more than that
    event = promote.carry_out(store, "icd", promote.PROMOTE, promote.Person(), alias="production", run_id="j1")
    assert event.body["to"] == made[-1]
    assert versions.resolve(store, f"icd@{made[0][:12]}").created_at < "2030"
    for junk in (5, {"a": 1}, {"settled": True, "made_from": 5}):
        forge(store, "versions", lambda _name, _entry, junk=junk: junk)
        assert [each.version for each in versions.list_versions(store, "icd")] == made[::-1]
    assert made_from(store, "icd") == dict.fromkeys(made, ())
    assert aliases.read_alias(store, "icd", "production") is not None
