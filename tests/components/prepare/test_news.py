import hashlib
from datetime import UTC, datetime, timedelta

import pytest

from components.prepare import prepare
from components.prepare import split as splitting
from components.prepare.prepare import Intake, SourceCount
from components.prepare.sources import Source
from components.prepare.split import deduplicate
from components.registry.between_runs import Consumed, content_ids
from tests.doubles.datasets import KeyedRecord, holding, validate

NEWEST = datetime(2026, 3, 31, tzinfo=UTC)


def records(start: int, end: int) -> list[KeyedRecord]:
    return [validate({"id": i, "prompt": f"question {i}", "completion": "a"}) for i in range(start, end)]


def source(name: str, days_old: float | None = 0, fingerprint: str = "1") -> Source:
    return Source(name, 1, fingerprint, None if days_old is None else NEWEST - timedelta(days=days_old))


def test_sources_that_came_or_changed_are_new() -> None:
    sources = [source("same"), source("changed", fingerprint="2"), source("came")]
    seen = {"same": "1", "changed": "1", "gone": "1"}
    consumed = Consumed(run_id="r", as_of="2026", sources=seen, num_records=0, file="")
    assert prepare.new_sources(sources, consumed) == sources[1:]
    assert prepare.new_sources(sources, None) == sources


def test_the_contents_of_distinct_records_are_those_that_were_given() -> None:
    given = records(0, 3)
    with holding([*given, *given]) as work:
        deduplicate(work)
        assert sorted(prepare.distinct_contents(work)) == sorted(each.content for each in given)


def test_records_are_new_by_content_wherever_they_stand() -> None:
    known = records(0, 5)
    changed = validate({"id": 0, "prompt": "question 0", "completion": "corrected"})
    now = [each.content for each in [*known[1:], changed, *records(10, 13)]]
    before = {each.content for each in known}
    assert prepare.count_new(content_ids(now), content_ids(before)) == len(set(now) - before) == 4
    assert prepare.count_new(content_ids(now), content_ids([])) == len(now)
    assert prepare.count_new(content_ids([]), content_ids(before)) == 0


def in_window(*parts: tuple[Source, int], days: float) -> set[int]:
    """Which of the records that the sources gave, so many each, are in the window."""
    read = Intake(sources=[SourceCount(each, count, 0) for each, count in parts])
    return {number for start, end in prepare.in_window(read, days=days) for number in range(start, end)}


def test_the_window_ends_at_the_newest_source_and_keeps_what_has_no_time() -> None:
    parts = (source("old", 8), 2), (source("edge", 7), 1), (source("new"), 1), (source("example", None), 1)
    assert in_window(*parts, days=7) == {2, 3, 4}


def test_rows_that_gave_no_record_are_not_counted_to_the_window() -> None:
    read = Intake(sources=[SourceCount(source("old", 30), 5, 2, 1), SourceCount(source("new"), 4, 1, 1)])
    assert prepare.in_window(read, days=7) == [(2, 4)]


def test_without_times_everything_is_in_the_window() -> None:
    assert in_window((source("example", None), 3), days=1) == {0, 1, 2}


def narrowed(
    everything: list[KeyedRecord], window: list[splitting.Span] | None, *, share: float
) -> tuple[splitting.Narrowed, set[str]]:
    """What was left out and replayed, and the ids of what stays."""
    with holding(everything) as work:
        deduplicate(work)
        work.run("CREATE TABLE others AS FROM chosen")
        found = splitting.narrow(work, window, replay_share=share)
        kept = work.rows("SELECT id FROM others JOIN records USING (number)")
    return found, {name for (name,) in kept}


def test_a_record_that_an_old_and_a_new_source_hold_is_in_the_window() -> None:
    found, kept = narrowed([*records(0, 5), *records(4, 6)], [(5, 7)], share=0)
    assert (found.before_window, kept) == (4, {"4", "5"})


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.2, 10), (0.5, 40), (0.9, 100)])
def test_replay_makes_up_its_share_of_the_result(share: float, replayed: int) -> None:
    everything = records(0, 140)
    found, kept = narrowed(everything, [(100, 140)], share=share)
    assert found == splitting.Narrowed(before_window=100 - replayed, replayed=replayed)
    assert len(kept) == 40 + replayed
    assert {each.record.id for each in everything[100:]} <= kept


def test_replay_takes_the_smallest_hashes_salted_with_the_window() -> None:
    everything = records(0, 140)
    recent = sorted(everything[100:], key=lambda each: (each.place, each.key, each.content))
    salt = hashlib.sha256(b"".join(each.content for each in recent)).digest()
    by_hash = sorted(everything[:100], key=lambda each: hashlib.sha256(salt + each.content).digest())
    _, kept = narrowed(everything, [(100, 140)], share=0.2)
    assert kept == {each.record.id for each in [*recent, *by_hash[:10]]}


def test_replay_is_the_same_for_the_same_data_and_another_for_the_next() -> None:
    everything = records(0, 150)

    def drawn(first: int, last: int) -> set[str]:
        _, kept = narrowed(everything[:last], [(first, last)], share=0.3)
        return kept - {each.record.id for each in everything[first:last]}

    assert drawn(100, 140) == drawn(100, 140)
    assert drawn(100, 140) != drawn(101, 141)
    assert len(drawn(100, 140)) == 17


def test_no_window_keeps_everything() -> None:
    found, kept = narrowed(records(0, 5), None, share=0.5)
    assert (found, kept) == (splitting.Narrowed(0, 0), set("01234"))
