"""Records that are never to be trained on again."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from components.prepare.dataset import Message, Record
from components.registry import between_runs
from components.shared.errors import DataError, IntegrityError, UserError
from components.store.store import Store
from tests.doubles import datasets


def test_of_an_erased_record_the_store_keeps_a_hash_who_and_when(store: Store) -> None:
    made = between_runs.erase(store, "patient/4711", by="ada")
    (info,) = store.list("erased/")
    body = store.get(info.key)
    assert b"4711" not in body + info.key.encode()
    record = hashlib.sha256(b"fineloop record patient/4711").hexdigest()
    assert json.loads(body) == {"format": 1, "record": record, "at": made.at, "by": "ada"}
    assert info.key == f"erased/{record}.json"


def test_erased_twice_is_erased_once_and_the_first_says_when(store: Store) -> None:
    first = between_runs.erase(store, "4711", by="ada")
    again = between_runs.erase(store, "4711", by="bob")
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.by, again.at) == ("ada", first.at)
    with pytest.raises(UserError, match="id is empty"):
        between_runs.erase(store, "", by="ada")


def test_of_many_at_once_none_is_lost(store: Store) -> None:
    assert not between_runs.erased(store)
    ids = [str(number) for number in range(40)]
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda each: between_runs.erase(store, each, by="ada"), ids * 2))
    assert sum(each.is_new for each in made) == 40
    found = between_runs.erased(store)
    assert [each for each in ids if not found.has(each)] == []
    assert not found.has("40")


def test_something_else_among_them_stops_who_reads_them(store: Store) -> None:
    store.put("erased/4711.json", b"{}")
    with pytest.raises(IntegrityError, match=r"erased/4711\.json is not an erasure"):
        between_runs.erased(store)


def test_a_dataset_that_holds_a_record_erased_since_is_refused_whichever_split_it_is_in(store: Store) -> None:
    rows = [Record(str(number), [Message("user", f"{number}?")], "a") for number in range(9)]
    uri = datasets.publish(store, train=rows[:5], evaluation=rows[5:8], replay=rows[8:]).uri
    store.put(f"{store.key(uri)}/tokens/1/ids.parquet.npy", b"not a split")
    between_runs.erase(store, "another", by="ada")
    between_runs.require_none_erased(store, uri)
    for count, record in enumerate(("1", "6", "8"), start=1):
        between_runs.erase(store, record, by="ada")
        with pytest.raises(DataError, match=f"^{uri} holds {count} record.* erased after it was made, .* prepare the"):
            between_runs.require_none_erased(store, uri)
