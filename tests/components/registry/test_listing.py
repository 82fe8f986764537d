"""The list of all adapters. The judge is what the functions for one adapter read without it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components.registry import cache, collect
from components.registry.aliases import list_aliases, promote, rollback
from components.registry.collect import all_adapters
from components.registry.versions import list_adapters, list_versions
from components.report.registry_page import write_pages
from components.shared.errors import ObjectMissing, StoreError
from components.store.store import BINARY, Store
from tests.components.registry.adapters import published, requests_of

NAMES = ("icd", "other", "third")


def publish(store: Store, name: str, weights: bytes) -> str:
    return published(store, weights, name=name, run_id=weights.hex()).version


@pytest.fixture
def three(store: Store) -> dict[str, list[str]]:
    """Three adapters with their versions, the second of which is in production."""
    made = {name: [publish(store, name, f"{name} {number}".encode()) for number in range(3)] for name in NAMES}
    for name, (_, second, _) in made.items():
        promote(store, name, second)
    return made


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


def collected(store: Store, made: dict[str, list[str]]) -> None:
    rules = collect.Rules(keep_last=0, older_than=timedelta(0))
    removals = collect.removals(store, ["icd"], rules, now=datetime.now(UTC))
    assert sum(collect.remove(store, each) for each in removals) == 2


CHANGES: dict[str, Callable[[Store, dict[str, list[str]]], Any]] = {
    "a promotion": lambda store, made: promote(store, "icd", made["icd"][2]),
    "a promotion to another alias": lambda store, made: promote(store, "icd", made["icd"][0], "staging"),
    "a rollback": lambda store, made: rollback(store, "icd", to=made["icd"][0]),
    "a publication": lambda store, made: publish(store, "icd", b"new"),
    "a version trained again": lambda store, made: (
        publish(store, "icd", b"n"),
        published(store, b"icd 0", run_id="another"),
    ),
    "a new adapter": lambda store, made: publish(store, "fourth", b"first"),
    "a collection": collected,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_list_takes_three_requests_and_sees_each_change(
    store: Store, three: dict[str, list[str]], sent: list[str], change: str
) -> None:
    assert listed(store) == judged(store)
    sent.clear()
    before = listed(store)
    assert len(sent) == 3
    CHANGES[change](store, three)
    after = judged(store)
    assert after != before
    sent.clear()
    assert listed(store) == after
    assert len(sent) <= 12  # one adapter is read, and the list is written
    sent.clear()
    assert listed(store) == after
    assert len(sent) == 3


def test_the_report_of_a_run_writes_its_adapters_line_and_a_list_after_it_reads_no_adapter(
    store: Store, three: dict[str, list[str]], sent: list[str]
) -> None:
    assert listed(store) == judged(store)
    promote(store, "icd", three["icd"][2])
    write_pages(store, "icd", generated_at="now")
    sent.clear()
    found = listed(store)
    assert len(sent) == 3
    assert found == judged(store)
    entry = store.get_json(cache.LISTED)["icd"]
    assert (entry["in_production"], entry[cache.LISTING]["aliases"]) == (
        three["icd"][2],
        {"production": three["icd"][2]},
    )


class Killed(Store):
    """A writer that dies when it writes a key that begins so; before that, and before an alias moves, `meanwhile`."""

    at = ""
    meanwhile: Callable[[], Any] = staticmethod(lambda: None)

    def _die(self, key: str, body: bytes | Path) -> None:
        dies = bool(self.at) and key.startswith(self.at) and not (isinstance(body, bytes) and body.startswith(b"being"))
        if dies or key.startswith("adapters/icd/aliases/"):
            self.meanwhile()
        if dies:
            self.at = ""
            raise KeyboardInterrupt

    def put(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> None:
        self._die(key, body)
        super().put(key, body, content_type=content_type)

    def create(self, key: str, body: bytes | Path, *, content_type: str = BINARY) -> str:
        self._die(key, body)
        return super().create(key, body, content_type=content_type)

    def swap(self, key: str, body: bytes | Path, etag: str, *, content_type: str = BINARY) -> str:
        self._die(key, body)
        assert isinstance(body, bytes)
        return super().swap(key, body, etag, content_type=content_type)


@pytest.mark.parametrize("at", [f"{cache.CHANGED}icd", "adapters/icd/events/", "adapters/icd/aliases/"])
def test_a_writer_that_dies_leaves_no_wrong_list_though_another_lists_meanwhile(
    store: Store, three: dict[str, list[str]], at: str
) -> None:
    assert listed(store) == judged(store)
    killed = Killed(store._client, store.bucket, store.prefix)
    killed.at, killed.meanwhile = at, lambda: listed(store)
    with pytest.raises(KeyboardInterrupt):
        promote(killed, "icd", three["icd"][2])
    for _ in range(2):
        assert listed(store) == judged(store)
    promote(store, "icd", three["icd"][2])
    assert listed(store) == judged(store)


def test_a_reader_that_was_overtaken_keeps_nothing_old(store: Store, three: dict[str, list[str]]) -> None:
    """Another run reads the adapter, and writes what it read once this one has moved the alias and told so."""

    class Slow(Store):
        moves = True

        def swap(self, key: str, body: bytes, etag: str, *, content_type: str = BINARY) -> str:
            if key == cache.LISTED and self.moves:
                self.moves = False
                promote(store, "icd", three["icd"][2])
                write_pages(store, "icd", generated_at="now")
                assert listed(store) == judged(store)
            return super().swap(key, body, etag, content_type=content_type)

    assert listed(store) == judged(store)
    promote(store, "other", three["other"][2])
    slow = Slow(store._client, store.bucket, store.prefix)
    assert listed(slow)["other"] == judged(store)["other"]
    assert listed(store) == judged(store)
    slow.moves = True
    write_pages(slow, "other", generated_at="now")
    assert listed(store) == judged(store)


@pytest.mark.parametrize(
    "entry",
    [None, [], {}, {"icd": 5}, {"icd": {}}, {"icd": {cache.LISTING: {"newest": 5}}}, {"icd": {cache.LISTING: []}}],
    ids=str,
)
def test_a_list_that_is_damaged_is_made_anew(store: Store, three: dict[str, list[str]], entry: Any) -> None:
    assert listed(store) == judged(store)
    store.put_json(cache.LISTED, entry)
    assert listed(store) == judged(store)
    assert store.get_json(cache.LISTED).keys() == {*NAMES}
    store.put(cache.LISTED, b"[" * 100_000)
    assert listed(store) == judged(store)


def test_who_may_write_neither_mark_nor_list_still_moves_aliases_and_reads_a_true_list(
    store: Store, three: dict[str, list[str]]
) -> None:
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


def test_the_newest_is_read_beneath_what_is_no_publication(store: Store, three: dict[str, list[str]]) -> None:
    store.put("adapters/icd/events/9999-ffffffffffff.json", b"junk")
    assert listed(store)["icd"] == judged(store)["icd"]
