from datetime import UTC, datetime, timedelta

import pytest

from components.prepare import news
from components.prepare.intake import Intake, SourceCount
from components.prepare.sources import Source
from components.prepare.validate import KeyedRecord, validate
from components.registry.watermark import Consumed, content_ids

NEWEST = datetime(2026, 3, 31, tzinfo=UTC)


def records(start: int, end: int) -> list[KeyedRecord]:
    return [validate({"id": i, "prompt": f"question {i}", "completion": "a"}) for i in range(start, end)]


def source(name: str, days_old: float | None = 0, fingerprint: str = "1") -> Source:
    return Source(name, 1, fingerprint, None if days_old is None else NEWEST - timedelta(days=days_old))


def intake(*parts: tuple[Source, list[KeyedRecord]]) -> Intake:
    return Intake(
        accepted=[record for _, given in parts for record in given],
        sources=[SourceCount(each, len(given), 0) for each, given in parts],
    )


def test_sources_that_came_or_changed_are_new() -> None:
    sources = [source("same"), source("changed", fingerprint="2"), source("came")]
    assert (
        news.new_sources(sources, Consumed("r", "2026", {"same": "1", "changed": "1", "gone": "1"}, 0)) == sources[1:]
    )
    assert news.new_sources(sources, None) == sources


def test_records_are_new_by_content_wherever_they_stand() -> None:
    known = records(0, 5)
    changed = validate({"id": 0, "prompt": "question 0", "completion": "corrected"})
    now = [each.content for each in [*known[1:], changed, *records(10, 13)]]
    before = {each.content for each in known}
    assert news.count_new(content_ids(now), content_ids(before)) == len(set(now) - before) == 4
    assert news.count_new(content_ids(now), content_ids([])) == len(now)
    assert news.count_new(content_ids([]), content_ids(before)) == 0


def test_the_window_ends_at_the_newest_source_and_keeps_what_has_no_time() -> None:
    old, edge, new, example = records(0, 1), records(1, 2), records(2, 3), records(3, 4)
    read = intake(
        (source("old", 8), old), (source("edge", 7), edge), (source("new"), new), (source("example", None), example)
    )
    assert news.in_window(read, days=7) == {each.content for each in edge + new + example}


def test_a_record_that_an_old_and_a_new_source_hold_is_in_the_window() -> None:
    read = intake((source("old", 30), records(0, 5)), (source("new"), records(4, 6)))
    assert news.in_window(read, days=7) == {each.content for each in records(4, 6)}


def test_without_times_everything_is_in_the_window() -> None:
    assert len(news.in_window(intake((source("example", None), records(0, 3))), days=1)) == 3


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.2, 10), (0.5, 40), (0.9, 100)])
def test_replay_makes_up_its_share_of_the_result(share: float, replayed: int) -> None:
    everything = records(0, 140)
    window = {each.content for each in everything[100:]}
    narrowed = news.narrow(everything, window, replay_share=share)
    assert narrowed.replayed == replayed
    assert narrowed.before_window == 100 - replayed
    assert len(narrowed.records) == 40 + replayed
    assert window <= {each.content for each in narrowed.records}
    assert narrowed.records == [each for each in everything if each in narrowed.records]


def test_replay_is_the_same_for_the_same_data_and_another_for_the_next() -> None:
    everything = records(0, 150)

    def drawn(first: int, last: int) -> set[str]:
        window = {each.content for each in everything[first:last]}
        narrowed = news.narrow(everything[:last], window, replay_share=0.3)
        return {each.record.id for each in narrowed.records if each.content not in window}

    assert drawn(100, 140) == drawn(100, 140)
    assert drawn(100, 140) != drawn(101, 141)
    assert len(drawn(100, 140)) == 17


def test_no_window_keeps_everything() -> None:
    everything = records(0, 5)
    assert news.narrow(everything, None, replay_share=0.5).records == everything
