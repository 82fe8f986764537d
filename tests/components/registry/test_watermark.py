import pytest

from components.registry import watermark
from components.registry.watermark import Consumed
from components.shared.errors import Conflict, IntegrityError, ObjectMissing
from components.store.store import Store


def consumed(run_id: str, hour: int) -> Consumed:
    return Consumed(run_id, f"2026-01-01T{hour:02}:00:00.000000Z", {"s3://b/a.jsonl": "etag"}, frozenset({"0f", "1e"}))


def test_an_adapter_begins_without_a_mark(store: Store) -> None:
    assert watermark.read(store, "sums") is None


def test_the_mark_moves_to_what_a_run_noted(store: Store) -> None:
    watermark.note(store, consumed("first", 1))
    assert watermark.read(store, "sums") is None  # noted is not yet consumed

    assert watermark.advance(store, "sums", "first")

    assert watermark.read(store, "sums") == consumed("first", 1)
    assert watermark.read(store, "others") is None


def test_the_mark_never_goes_back(store: Store) -> None:
    for run_id, hour in (("late", 9), ("early", 3)):
        watermark.note(store, consumed(run_id, hour))
    assert watermark.advance(store, "sums", "late")
    assert not watermark.advance(store, "sums", "early")
    assert watermark.advance(store, "sums", "late")  # a step that is run again
    assert watermark.read(store, "sums") == consumed("late", 9)


def test_a_run_without_a_note_moves_nothing(store: Store) -> None:
    with pytest.raises(ObjectMissing, match=r"runs/none/consumed\.json"):
        watermark.advance(store, "sums", "none")


def test_a_note_that_is_gone_makes_everything_new(store: Store) -> None:
    watermark.note(store, consumed("first", 1))
    watermark.advance(store, "sums", "first")
    store.delete(["runs/first/consumed.json"])
    assert watermark.read(store, "sums") is None


def test_two_runs_that_end_together_leave_the_later_look(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id, hour in (("first", 1), ("second", 2), ("third", 3)):
        watermark.note(store, consumed(run_id, hour))
    watermark.advance(store, "sums", "first")
    real_swap = Store.swap

    def swap_after_another(self: Store, *arguments: object, **options: object) -> str:
        monkeypatch.setattr(Store, "swap", real_swap)
        watermark.advance(store, "sums", "third")
        return real_swap(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "swap", swap_after_another)
    assert not watermark.advance(store, "sums", "second")
    assert watermark.read(store, "sums") == consumed("third", 3)


def test_a_mark_that_always_moves_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_arguments: object, **_options: object) -> str:
        raise Conflict("moved")

    watermark.note(store, consumed("first", 1))
    monkeypatch.setattr(Store, "create", lose)
    with pytest.raises(Conflict, match="5 times in a row"):
        watermark.advance(store, "sums", "first")


@pytest.mark.parametrize("body", [[], {"format": 2, "run_id": "r", "as_of": "t"}, {"format": 1}])
def test_something_else_in_its_place_is_said(store: Store, body: object) -> None:
    store.put_json("adapters/sums/watermark.json", body)
    with pytest.raises(IntegrityError, match="not a watermark of format 1"):
        watermark.read(store, "sums")
