"""What runs leave for later ones, and records that are never to be trained on again."""

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from components.prepare.dataset import Message, Record
from components.records import runs
from components.registry import between_runs
from components.registry.audit import audit
from components.registry.between_runs import Consumed, Watermark
from components.shared.errors import DataError, IntegrityError, ObjectMissing, UserError
from components.store.store import Store
from tests.doubles import datasets


def hashes(start: int, end: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(start, end)]


def noted(store: Store, run_id: str, hour: int, *, records: int = 2) -> Consumed:
    as_of, contents = f"2026-01-01T{hour:02}:00:00.000000Z", between_runs.content_ids(hashes(0, records))
    return between_runs.note_consumed(store, run_id, as_of=as_of, sources={"s3://b/a.jsonl": "etag"}, contents=contents)


def test_the_mark_moves_to_what_a_run_noted(store: Store) -> None:
    first = noted(store, "first", 1)
    assert between_runs.read_watermark(store, "sums") is None  # noted is not yet consumed
    assert between_runs.advance_watermark(store, "sums", "first")

    assert between_runs.read_watermark(store, "sums") == first
    assert (first.run_id, first.sources, first.num_records) == ("first", {"s3://b/a.jsonl": "etag"}, 2)
    assert between_runs.read_watermark(store, "others") is None
    store.delete(["runs/first/consumed/header.json"])
    assert between_runs.read_watermark(store, "sums") is None  # gone: everything counts as new


def test_what_a_run_did_not_read_is_new_since_it(store: Store) -> None:
    noted(store, "first", 1, records=3)
    assert between_runs.are_new_since(store, "first", hashes(1, 5)) == [False, False, True, True]
    assert between_runs.are_new_since(store, "none", hashes(1, 5)) is None
    assert between_runs.are_new_since(store, "", hashes(1, 5)) is None


def test_the_mark_never_goes_back(store: Store) -> None:
    late, _ = [noted(store, run_id, hour) for run_id, hour in (("late", 9), ("early", 3))]
    assert between_runs.advance_watermark(store, "sums", "late")
    assert not between_runs.advance_watermark(store, "sums", "early")
    assert between_runs.advance_watermark(store, "sums", "late")  # a step that is run again
    assert between_runs.read_watermark(store, "sums") == late


def test_a_note_and_a_mark_of_a_time_to_come_are_refused_by_name(store: Store) -> None:
    earlier = noted(store, "earlier", 1)
    between_runs.advance_watermark(store, "sums", "earlier")
    forged = earlier.model_copy(update={"run_id": "forged", "as_of": "9999-01-01T00:00:00.000000Z"})
    runs.write(store, "forged", forged)
    with pytest.raises(IntegrityError, match=r"runs/forged/consumed/header\.json says .* at 9999-.* yet to come"):
        between_runs.advance_watermark(store, "sums", "forged")
    assert between_runs.read_watermark(store, "sums") == earlier

    mark = Watermark(run_id="forged", as_of=forged.as_of)
    store.put("adapters/sums/watermark.json", mark.as_json())
    noted(store, "later", 2)
    for ask in (between_runs.read_watermark, lambda *of: between_runs.advance_watermark(*of, "later")):
        with pytest.raises(IntegrityError, match=r"adapters/sums/watermark\.json says .* yet to come"):
            ask(store, "sums")


def test_a_run_without_a_note_moves_nothing(store: Store) -> None:
    with pytest.raises(ObjectMissing, match=r"runs/none/consumed/header\.json"):
        between_runs.advance_watermark(store, "sums", "none")


def test_two_runs_that_end_together_leave_the_later_look(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, third = [noted(store, run_id, hour) for run_id, hour in (("first", 1), ("second", 2), ("third", 3))]
    between_runs.advance_watermark(store, "sums", "first")
    real_swap = Store.swap

    def swap_after_another(self: Store, *arguments: object, **options: object) -> str:
        monkeypatch.setattr(Store, "swap", real_swap)
        between_runs.advance_watermark(store, "sums", "third")
        return real_swap(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "swap", swap_after_another)
    assert not between_runs.advance_watermark(store, "sums", "second")
    assert between_runs.read_watermark(store, "sums") == third


@pytest.mark.parametrize("body", [[], {"format": 2, "run_id": "r", "as_of": "t"}, {"format": 1}])
def test_something_else_in_its_place_is_said(store: Store, body: object) -> None:
    store.put_json("adapters/sums/watermark.json", body)
    with pytest.raises(IntegrityError, match=r"adapters/sums/watermark\.json"):
        between_runs.read_watermark(store, "sums")


def test_the_contents_are_the_first_64_bits_of_their_sha256(store: Store) -> None:
    """The judge is a set of Python's own integers."""
    given = hashes(0, 10_000)
    random.Random(0).shuffle(given)
    consumed = between_runs.note_consumed(store, "r", as_of="t", sources={}, contents=between_runs.content_ids(given))
    wanted = {int(content.hex()[:16], 16) for content in given}
    found = between_runs.consumed_contents(store, consumed).to_pylist()
    assert found == sorted(wanted)
    assert consumed.num_records == len(found) == 10_000
    sizes = {info.key: info.size for info in store.list("runs/r/")}
    assert sizes.pop("runs/r/consumed/header.json") < 1000
    assert sum(sizes.values()) < 8 * 10_000  # less than the bare numbers take


def test_moving_the_mark_opens_no_contents(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    consumed = noted(store, "r", 1)
    store.delete([f"runs/r/{consumed.file}"])
    assert between_runs.advance_watermark(store, "sums", "r")
    assert runs.find(store, "r", between_runs.Consumed) == consumed == between_runs.read_watermark(store, "sums")
    assert len(between_runs.consumed_contents(store, consumed)) == 0  # gone: everything counts as new


def test_a_step_that_breaks_off_leaves_the_note_before_it_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = noted(store, "r", 1, records=3)

    def fail(*_arguments: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as context:
        context.setattr(runs, "write", fail)
        with pytest.raises(ConnectionError):
            noted(store, "r", 2, records=4)
    found = runs.find(store, "r", between_runs.Consumed)
    assert found == first
    assert len(between_runs.consumed_contents(store, first)) == 3


def test_contents_that_were_changed_are_refused_and_found_by_an_audit(store: Store) -> None:
    consumed = noted(store, "r", 1)
    between_runs.advance_watermark(store, "sums", "r")
    assert audit(store, "sums").findings == ()
    store.put(f"runs/r/{consumed.file}", b"PAR1")
    with pytest.raises(IntegrityError, match="another content than its name says"):
        between_runs.consumed_contents(store, consumed)
    (finding,) = audit(store, "sums").findings
    assert finding.where == store.uri("adapters/sums/watermark.json")


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
