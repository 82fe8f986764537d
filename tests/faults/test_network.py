"""Answers that get lost, come twice or never, and a store that is busy: no caller gets a wrong answer."""

from collections.abc import Iterator

import pytest

from components.config.schema import RegistryConfig
from components.registry.aliases import Cause, promote, read_alias
from components.registry.event_log import events
from components.shared.errors import Conflict, StoreError
from components.store import client
from components.store.store import Store
from tests.doubles.faulty_proxy import Fault, FaultyProxy, faulty_proxy

CAUSE = Cause("run-2", reason="better")
ALIAS, EVENT, MANIFEST = "aliases/production", "events/", "manifest.json"


@pytest.fixture
def proxy(s3_server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "BUSY_PAUSE_S", 0.01)
    monkeypatch.setattr(client, "CONFLICT_PAUSE_S", 0.01)
    with faulty_proxy(s3_server.url) as made:
        yield made


@pytest.fixture
def behind_proxy(proxy: FaultyProxy, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same registry, through the proxy."""
    with monkeypatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        return Store.open(RegistryConfig(bucket=store.bucket, prefix=store.prefix))


@pytest.mark.slow
@pytest.mark.parametrize("about", [ALIAS, EVENT, MANIFEST])
@pytest.mark.parametrize("faults", [["lost"], ["doubled"], ["lost"] * 2, ["busy"] * 6, ["undecided"] * 6], ids=" ".join)
def test_a_run_whose_answers_get_lost_or_come_twice_or_late_succeeds_once(
    store: Store, behind_proxy: Store, proxy: FaultyProxy, publish, assert_sound, about: str, faults: list
) -> None:
    before = publish(store, "first")
    promote(store, "icd", before)
    proxy.about, proxy.faults = about, list(faults)
    candidate = publish(behind_proxy, "second")
    event = promote(behind_proxy, "icd", candidate, expected=before, cause=CAUSE)
    assert proxy.faults == []  # else nothing was tried
    assert_sound(store, reported=[event])
    assert [each.kind for each in events(store, "icd")].count("promoted") == 2


@pytest.mark.parametrize("fault", ["lost", "hung"])
def test_a_move_whose_every_answer_is_lost_is_no_conflict_with_oneself_and_the_rerun_says_the_same(
    store: Store, behind_proxy: Store, proxy: FaultyProxy, publish, assert_sound, fault
) -> None:
    before, candidate = publish(store, "first"), publish(store, "second")
    promote(store, "icd", before)
    proxy.about, proxy.faults = ALIAS, [fault] * client.ATTEMPTS
    with pytest.raises(StoreError) as failed:
        promote(behind_proxy, "icd", candidate, expected=before, cause=CAUSE)
    assert "did not answer" in str(failed.value) or "cannot be reached" in str(failed.value)
    pointer = read_alias(store, "icd", "production")
    assert pointer.version == candidate  # it was carried out, and a repeated call reports that
    event = promote(behind_proxy, "icd", candidate, expected=before, cause=CAUSE)
    assert event.time == pointer.since
    assert_sound(store, reported=[event])


def test_a_store_that_never_decides_is_no_conflict(
    store: Store, behind_proxy: Store, proxy: FaultyProxy, publish, assert_sound
) -> None:
    before, candidate = publish(store, "first"), publish(store, "second")
    promote(store, "icd", before)
    proxy.about, proxy.faults = ALIAS, ["undecided"] * client.ATTEMPTS_WHERE_BUSY
    with pytest.raises(StoreError, match="ConditionalRequestConflict") as failed:
        promote(behind_proxy, "icd", candidate, expected=before, cause=CAUSE)
    assert not isinstance(failed.value, Conflict)
    assert proxy.faults == []
    assert_sound(store)
    assert promote(behind_proxy, "icd", candidate, expected=before, cause=CAUSE).body["to"] == candidate


@pytest.mark.parametrize("fault", ["doubled", "lost"])
def test_a_good_store_passes_its_check_though_a_write_comes_twice(
    behind_proxy: Store, proxy: FaultyProxy, fault: Fault
) -> None:
    for written in range(2):
        proxy.about, proxy.faults = ".check/", [fault]
        behind_proxy.check()
        assert proxy.faults == [], written
