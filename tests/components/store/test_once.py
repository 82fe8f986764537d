"""A store that reads each thing once: the judge is what the client sends, and what lies there."""

import pytest

from components.store.store import ReadOnce, Store


@pytest.fixture
def sent(store: Store) -> list[str]:
    found: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: found.append(request.method) or None)
    return found


def test_an_object_and_a_listing_are_read_once(store: Store, sent: list[str]) -> None:
    for key in ("a/1", "a/b/2", "a-c/3"):
        store.put(key, key.encode())
    once = ReadOnce(store)
    sent.clear()
    for _ in range(2):
        assert once.get("a-c/3") == b"a-c/3"
        assert once.read("a-c/4") is None
        assert [*once.folders("")] == [*store.folders("")] == ["a", "a-c"]
        assert [info.key for info in once.list("a/")] == ["a/1", "a/b/2"]
        assert [info.key for info in once.list("a/b/")] == ["a/b/2"]
        assert once.read("a/b/3") is None
    assert len(sent) == 4 + 2  # two of them are the store's own


def test_what_is_written_meanwhile_is_not_seen(store: Store) -> None:
    once = ReadOnce(store)
    store.put("a/1", b"1")
    assert [*once.folders("")] == ["a"]
    assert [info.key for info in once.list("a/")] == ["a/1"]
    assert once.get("a/1") == b"1"
    store.put("a/1", b"2")
    store.put("a/2", b"2")
    assert (once.get("a/1"), once.read("a/2")) == (b"1", None)
