import hashlib
import json
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.train import ColumnsConfig
from components.prepare import prepare as preparing
from components.prepare.dataset import load_split
from components.prepare.prepare import Intake, prepare, require_usable
from components.prepare.sources import Source, find_sources
from components.prepare.validate import Counts
from components.registry.between_runs import Erased, erase, record_hash
from components.shared.errors import DataError
from tests.doubles import datasets
from tests.doubles.datasets import Read, read


def good(count: int) -> list[Any]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


def read_of(source: str | list[str]) -> Read:
    return read(find_sources(source))


def intake_of(source: str | list[str]) -> Intake:
    return read_of(source).counts


def test_a_bad_row_is_kept_with_its_source_line_reason_and_text(write_rows: Callable[..., str]) -> None:
    name = write_rows([*good(2), '{"prompt": "x", "completion": ""}', b'{"prompt": "caf\xe9"}', "\u00e4" * 5000])
    empty, undecodable, long = read_of(name).rejects
    assert (empty.source, empty.line, empty.reason) == (name, 3, "completion is empty")
    assert empty.row == '{"prompt": "x", "completion": ""}'
    assert (undecodable.line, undecodable.reason) == (4, "not UTF-8 at byte 16")
    assert undecodable.row == '{"prompt": "caf\ufffd"}'
    assert len(long.row) == 2000


def test_a_time_that_python_does_not_reach_spoils_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    times = pa.array([0, 2**62, -(2**62), 1], pa.timestamp("us"))
    pq.write_table(pa.table({"id": times, "prompt": ["a", "b", "c", "d"], "completion": ["x"] * 4}), path)
    found = read_of(str(path))
    unread = [reject.line for reject in found.rejects if reject.reason.startswith("a value that cannot be read")]
    assert unread == [2, 3]


@pytest.mark.parametrize(("num_bad", "stops"), [(5, False), (6, True)])
def test_rows_are_refused_only_above_the_limit(num_bad: int, stops: bool, write_rows, caplog) -> None:
    caplog.set_level(logging.INFO)
    intake = intake_of(write_rows([*good(100 - num_bad), *["{}"] * num_bad]))
    refused = pytest.raises(DataError, match=r"6\.0% .*\(6 of 100\).*data\.max_reject_share = 0\.05")
    with refused if stops else nullcontext():
        require_usable(intake, max_reject_share=0.05)
    assert stops or f"{num_bad}.00 % of rows are unusable" in caplog.text


def test_the_refusal_shows_the_three_most_frequent_reasons_with_an_example_each(write_rows: Callable[..., str]) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "critic", "content": "x"}]
    bad = [
        *[{"prompt": "a", "completion": ""}] * 3,
        *["{broken", "{ broken"],
        {"messages": messages},
        {"messages": messages[::-1]},
        {"prompt": 3, "completion": "x"},
    ]
    name = write_rows([*good(2), *bad])
    with pytest.raises(DataError) as refusal:
        require_usable(intake_of(name), max_reject_share=0.5)
    _, *reasons, others, _ = str(refusal.value).splitlines()
    assert reasons[0] == f"  3 x completion is empty (for example {name}:3)"
    assert re.match(rf"  2 x not JSON: .* at column N \(for example {name}:6\)", reasons[1])
    assert reasons[2].startswith("  2 x messages[N].role is 'critic'")
    assert (len(reasons), others) == (3, "  1 x 1 other reasons")


@pytest.mark.parametrize("content", [[], ["", "  "]])
def test_empty_data_is_refused(content: list[str], write_rows: Callable[..., str]) -> None:
    name = write_rows(content)
    with pytest.raises(DataError, match=r"data\.source has no rows: .*rows\.jsonl is empty"):
        require_usable(intake_of(name), max_reject_share=1.0)


def test_unknown_columns_of_parquet_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"topic": ["a", "b"], "output": ["c", "d"]}), path)
    intake = intake_of(str(path))
    assert intake.total.rows == 2
    with pytest.raises(DataError, match=r"found 'topic', 'output'; expected"):
        require_usable(intake, max_reject_share=1.0)


def test_columns_and_sources_are_counted(write_rows: Callable[..., str]) -> None:
    first = write_rows([{**row, "topic": "t"} for row in good(2)], "a.jsonl")
    second = write_rows([*good(1), "{}"], "b.jsonl")
    intake = intake_of([first, second])
    assert intake.columns == {"prompt": 3, "completion": 3, "topic": 2}
    by_source = [(source.name, counts.rows, counts.rejected) for source, counts in intake.sources]
    assert by_source == [(first, 2, 0), (second, 2, 1)]


NEWEST = datetime(2026, 3, 31, tzinfo=UTC)


def source_of(name: str, days_old: float | None = 0) -> Source:
    return Source(name, 1, "1", None if days_old is None else NEWEST - timedelta(days=days_old))


def in_window(*parts: tuple[Source, int], days: float) -> set[int]:
    """Which of the records that the sources gave, so many each, are in the window."""
    read = Intake(sources=[(each, Counts(count)) for each, count in parts])
    return {number for start, end in preparing.in_window(read, days=days) for number in range(start, end)}


def test_the_window_ends_at_the_newest_source_and_keeps_what_has_no_time() -> None:
    parts = (source_of("old", 8), 2), (source_of("edge", 7), 1), (source_of("new"), 1), (source_of("example", None), 1)
    assert in_window(*parts, days=7) == {2, 3, 4}
    assert in_window((source_of("example", None), 3), days=1) == {0, 1, 2}


def test_rows_that_gave_no_record_are_not_counted_to_the_window() -> None:
    read = Intake(sources=[(source_of("old", 30), Counts(5, 2, 1)), (source_of("new"), Counts(4, 1, 1))])
    assert preparing.in_window(read, days=7) == [(2, 4)]


# Erased records in a preparation: whatever the source holds, none of their text goes on.


Write = Callable[..., str]


def rows(start: int, end: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, end)]


def read_without(source: str, *ids: str, **options: Any) -> Read:
    return datasets.read(find_sources(source), erased=Erased(frozenset(map(record_hash, ids))), **options)


def kept(found: Read) -> list[str]:
    return [each.record.id for each in found.accepted]


def test_rows_of_an_erased_id_are_counted_and_nothing_else(write_rows: Write) -> None:
    found = read_without(write_rows([*rows(0, 5), {"id": "3", "prompt": "later", "completion": "row"}]), "3", "99")
    assert kept(found) == ["0", "1", "2", "4"]
    total = found.counts.total
    assert (total.rows, total.rejected, total.erased, total.accepted) == (6, 0, 2, 4)


def test_a_row_without_an_id_is_known_by_its_content(write_rows: Write) -> None:
    path = write_rows([{"prompt": f"question {i}", "completion": "a"} for i in range(4)])
    (*_, last) = kept(read_without(path))
    content = hashlib.sha256(b"user:10:question 3answer:a").hexdigest()
    assert last == content[:16]
    for by in (content[:16], content):
        assert read_without(path, by).counts.total.erased == 1
        assert last not in kept(read_without(path, by))


def test_every_source_of_two_is_counted_by_itself(write_rows: Write, tmp_path: Path) -> None:
    write_rows(rows(0, 5), "in/1.jsonl")
    write_rows(rows(3, 9), "in/2.jsonl")
    found = read_without(str(tmp_path / "in"), "3", "8")
    assert [each.erased for _, each in found.counts.sources] == [1, 2]
    assert kept(found) == ["0", "1", "2", "4", "4", "5", "6", "7"]


@pytest.mark.parametrize("named", [ColumnsConfig(), ColumnsConfig(id="who")])
def test_the_id_is_that_of_the_column_that_the_config_names(write_rows: Write, named: ColumnsConfig) -> None:
    path = write_rows([{"id": "a", "who": "b", "prompt": f"{n}", "completion": "x"} for n in range(3)])
    assert read_without(path, "b", columns=named).counts.total.erased == (3 if named.id else 0)
    assert read_without(path, "a", columns=named).counts.total.erased == (0 if named.id else 3)
    path = write_rows([{"id": "a", "prompt": "p", "completion": "x"}, {"who": "b", "prompt": "q", "completion": "x"}])
    assert kept(read_without(path, "a", columns=ColumnsConfig(id="who"))) == ["b"]


def test_an_unusable_row_of_theirs_is_no_reject(write_rows: Write) -> None:
    found = read_without(write_rows([*rows(0, 3), {"id": 9, "prompt": "secret", "completion": ""}]), "9")
    assert found.rejects == []
    assert found.counts.total.erased == 1


def test_of_an_unusable_row_that_may_be_theirs_no_text_is_kept(write_rows: Write) -> None:
    bad = ['{"id": 9, "prompt": "secret', {"prompt": "secret"}, '{"id": "\\ud800", "prompt": "secret"}']
    others = {"id": 8, "prompt": "of somebody else"}
    path = write_rows([*rows(0, 3), *bad, others])
    *theirs, last = read_without(path, "9").rejects
    assert len(theirs) == 3
    assert not any("secret" in each.row for each in theirs)
    assert json.loads(last.row) == others
    assert all("secret" in each.row for each in read_without(path).rejects[:3])  # where nobody was erased, as ever


def test_a_preparation_says_how_many_are_left_out_and_accounts_for_every_row(write_rows, store, run_config) -> None:
    config = run_config(write_rows(rows(0, 100)), eval_share=0.3)
    before = prepare(config, store)
    for each in ("7", "8"):
        erase(store, each, by="ada")
    after = prepare(config, store)
    assert after.left_out["erased"] == 2
    assert "left out: 2 erased" in after.summary
    assert after.dataset_id != before.dataset_id
    profile = store.get_json(f"datasets/{after.dataset_id}/profile.json")
    assert profile["dropped"]["erased"] == 2
    records = [each["records"] for each in profile["splits"].values()]
    assert profile["rows"]["read"] == 100 == sum(profile["dropped"].values()) + sum(records)
    ids = {each.id for split in ("train", "eval") for each in load_split(store, after.uri, split)}
    assert ids == {str(n) for n in range(100)} - {"7", "8"}
