"""A schedule's view of prepare: what is new since the last run that ended in a decision."""

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config.schema import RunConfig
from components.prepare.dataset import load_split
from components.prepare.prepare import PreparedDataset, prepare, prepare_if_new
from components.records import runs
from components.registry import between_runs
from components.shared.errors import DataError
from components.step.step import StepRun
from components.store.store import Store

Write = Callable[..., str]
Prepare = Callable[..., tuple[PreparedDataset | None, StepRun]]


def rows(start: int, end: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i % 7}"} for i in range(start, end)]


@pytest.fixture
def prepare_run(store: Store, tmp_path: Path, run_config: Callable[..., RunConfig]) -> Prepare:
    """Prepare as the run `run_id`; `decided` moves the watermark, as the end of a run does."""

    def run(
        run_id: str, *, decided: bool = False, source: str = "", **data: Any
    ) -> tuple[PreparedDataset | None, StepRun]:
        config = run_config(source or str(tmp_path / "in"), **{"eval_share": 0.3, "min_new_records": 1, **data})
        step = StepRun("prepare", run_id, config, store)
        prepared = prepare_if_new(step)
        if decided:
            between_runs.advance_watermark(store, "test", run_id)
        return prepared, step

    return run


def test_known_sources_are_skipped_without_being_opened(write_rows, prepare_run, store: Store, monkeypatch) -> None:
    path = write_rows(rows(0, 100), "in/1.jsonl")
    prepare_run("first", decided=True)
    monkeypatch.setattr("components.prepare.prepare.read_sources", lambda _: pytest.fail("opened"))

    prepared, step = prepare_run("second")

    assert prepared is None
    decision = store.get_json("runs/second/decision.json")
    assert (decision["decision"], decision["since_run"]) == ("skipped", "first")
    assert decision["reasons"] == [f"nothing new since run first, which read {path}"]
    assert step.result["skipped"] == decision["reasons"][0]
    assert runs.find(store, "second", between_runs.Consumed) is None


def test_new_records_are_trained_on_with_the_earlier_ones(write_rows: Write, prepare_run: Prepare) -> None:
    write_rows(rows(0, 100), "in/1.jsonl")
    prepare_run("first", decided=True)
    write_rows([*rows(95, 130), {"id": 3, "prompt": "question 3", "completion": "corrected"}], "in/2.jsonl")
    prepared, step = prepare_run("second")
    assert prepared.train_records + prepared.eval_records == 130
    assert step.result["new_records"] == 31


def test_too_few_new_records_wait_for_more(write_rows: Write, prepare_run: Prepare, store: Store) -> None:
    write_rows(rows(0, 100), "in/1.jsonl")
    _, first = prepare_run("first", decided=True, min_new_records=5000)  # nothing was consumed: there is no "new"
    assert first.result["new_records"] == 100
    write_rows(rows(100, 109), "in/2.jsonl")
    assert prepare_run("second", min_new_records=10)[0] is None
    (reason,) = store.get_json("runs/second/decision.json")["reasons"]
    assert reason.startswith("9 records are new since run first")
    write_rows(rows(109, 110), "in/3.jsonl")
    assert prepare_run("third", min_new_records=10)[0] is not None


def test_a_file_that_is_rewritten_with_the_same_records_is_no_news(write_rows: Write, prepare_run: Prepare) -> None:
    path = write_rows(rows(0, 100), "in/1.jsonl")
    prepare_run("first", decided=True)
    write_rows(rows(0, 100)[::-1], "in/1.jsonl")
    os.utime(path, (1, 1))
    prepared, step = prepare_run("second")
    assert prepared is None
    assert step.result["new_records"] == 0


def test_a_run_that_came_to_no_decision_has_consumed_nothing(write_rows: Write, prepare_run: Prepare) -> None:
    write_rows(rows(0, 100), "in/1.jsonl")
    prepare_run("failed")
    assert prepare_run("next")[0] is not None


def test_a_decided_run_that_is_repeated_or_asks_for_no_news_does_not_skip(write_rows, prepare_run, store) -> None:
    write_rows(rows(0, 100), "in/1.jsonl")
    first, step = prepare_run("first", decided=True)
    again, _ = prepare_run("first")
    other, _ = prepare_run("second", min_new_records=0)
    ids = [each and each.dataset_id for each in (first, again, other)]
    assert ids == [prepare(step.config, store).dataset_id] * 3


def test_objects_of_the_store_are_known_by_their_etag(write_rows: Write, prepare_run: Prepare, store: Store) -> None:
    store.put("in/1.jsonl", Path(write_rows(rows(0, 100))))
    source = store.uri("in/")
    prepare_run("first", decided=True, source=source)
    store.put("in/1.jsonl", Path(write_rows(rows(0, 100))))  # the same bytes, later
    assert prepare_run("second", source=source)[0] is None
    store.put("in/2.jsonl", Path(write_rows(rows(100, 103))))
    assert prepare_run("third", source=source)[1].result["new_records"] == 3


@pytest.fixture
def aged(write_rows: Write) -> Callable[..., None]:
    """Write files of rows, each given by the first, one more than the last, and its age in days."""

    def write(*parts: tuple[int, int, int]) -> None:
        for start, end, days in parts:
            path = write_rows(rows(start, end), f"in/{start}.jsonl")
            os.utime(path, (1e9 - days * 86_400, 1e9 - days * 86_400))

    return write


def test_a_window_trains_on_what_is_recent_and_holds_out_from_all(aged, prepare_run: Prepare, store: Store) -> None:
    aged((0, 200, 40), (200, 260, 3), (260, 300, 0))
    prepared, _ = prepare_run("first", window_days=7)
    train = {int(record.id) for record in load_split(store, prepared.uri, "train")}
    held_out = {int(record.id) for record in load_split(store, prepared.uri, "eval")}
    assert min(train) >= 200
    assert len(held_out & set(range(200))) > 30
    profile = store.get_json(f"datasets/{prepared.dataset_id}/profile.json")
    assert profile["dropped"]["before_window"] == 300 - len(train) - len(held_out)

    replaying, _ = prepare_run("second", window_days=7, replay_share=0.25)
    mixed = {int(record.id) for record in load_split(store, replaying.uri, "train")}
    assert mixed > train
    assert len(mixed & set(range(200))) == round(len(train) / 3)
    assert store.get_json(f"datasets/{replaying.dataset_id}/profile.json")["replayed"] == round(len(train) / 3)


def test_what_production_is_to_answer_is_what_would_be_replayed_and_stands_apart(aged, prepare_run, store) -> None:
    aged((0, 200, 40), (200, 300, 0))
    asked = {"window_days": 7, "replay_share": 0.25}
    mixed, _ = prepare_run("mixed", **asked)
    apart, _ = prepare_run("apart", **asked, replay_from="production")
    train, earlier = (load_split(store, apart.uri, split) for split in ("train", "replay"))
    assert {int(record.id) for record in earlier} <= set(range(200))
    key = operator.attrgetter("id")
    assert sorted(train + earlier, key=key) == sorted(load_split(store, mixed.uri, "train"), key=key)
    assert load_split(store, apart.uri, "eval") == load_split(store, mixed.uri, "eval")
    assert apart.dataset_id != mixed.dataset_id
    assert f"{len(train)} records to train on, {apart.eval_records} held out, {len(earlier)} earlier" in apart.summary


def test_of_few_records_to_train_on_production_answers_as_few(aged, prepare_run: Prepare, store: Store) -> None:
    aged((0, 200, 40), (200, 300, 0))
    few, _ = prepare_run("few", window_days=7, replay_share=0.5, replay_from="production", max_records=40)
    assert few.replay_records == few.train_records < 40
    profile = store.get_json(f"datasets/{few.dataset_id}/profile.json")
    dropped = sum(profile["dropped"].values())
    assert dropped + few.train_records + few.eval_records + few.replay_records == 300


def test_replay_without_a_window_is_refused(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match=r"set data\.window_days, or remove data\.replay_share"):
        run_config("x", replay_share=0.2)
    with pytest.raises(ValueError, match=r"set data\.replay_share, or remove data\.replay_from"):
        run_config("x", window_days=7, replay_from="production")


def test_missing_data_is_an_error_and_no_skip(prepare_run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare_run("first")
