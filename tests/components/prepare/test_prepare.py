import json
import logging
import operator
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.config.schema import RunConfig
from components.prepare import icd10
from components.prepare.dataset import load_split
from components.prepare.prepare import PreparedDataset, prepare, prepare_if_new
from components.records import runs
from components.registry import between_runs
from components.shared import machine
from components.shared.errors import DataError, IntegrityError, ObjectMissing
from components.step.step import StepRun
from components.store import folders
from components.store.store import Store

Write = Callable[..., str]
Config = Callable[..., RunConfig]


def topical(count: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i % 7}", "topic": "t"} for i in range(count)]


def test_on_a_machine_that_is_out_of_memory_nothing_is_begun(store, write_rows: Write, run_config, monkeypatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 400 * 2**20)
    with pytest.raises(DataError, match=r"^0\.3 GiB of memory are free for the records of data\.source"):
        prepare(run_config(write_rows(topical(99)), eval_share=0.2), store)


def test_prepare_writes_what_load_split_reads(store: Store, write_rows: Write, run_config: Config) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    chat = {"messages": [{"role": role, "content": f"c {role}"} for role in roles]}
    prepared = prepare(run_config(write_rows([*topical(99), chat]), eval_share=0.2), store)
    train, evaluation = (load_split(store, prepared.uri, split) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (prepared.train_records, prepared.eval_records)
    by_id = {record.id: record for record in train + evaluation}
    assert len(by_id) == 100
    assert (by_id["3"].prompt[0].content, by_id["3"].answer) == ("question 3", "answer 3")
    (conversation,) = [record for record in train + evaluation if len(record.prompt) > 1]
    assert [turn.role for turn in conversation.prompt] == ["system", "user", "assistant", "user"]
    assert conversation.answer == "c assistant"


def test_bad_rows_are_published_with_their_place_and_reason(store, write_rows, run_config, tmp_path: Path) -> None:
    source = write_rows([*topical(99), {"prompt": "p", "completion": ""}])
    prepared = prepare(run_config(source), store)
    store.download(f"datasets/{prepared.dataset_id}/rejects.parquet", tmp_path / "rejects.parquet")
    manifest = folders.read_manifest(store, f"datasets/{prepared.dataset_id}")
    files = {"train/part-00000.parquet", "eval/part-00000.parquet", "rejects.parquet", "profile.json"}
    assert (set(manifest.files), manifest.about["train_records"]) == (files, prepared.train_records)
    reject = {"line": 100, "reason": "completion is empty", "row": '{"prompt": "p", "completion": ""}'}
    assert pq.read_table(tmp_path / "rejects.parquet").to_pylist() == [{"source": source, **reject}]


def test_profile_and_summary_account_for_every_row(store: Store, write_rows: Write, run_config: Config, caplog) -> None:
    caplog.set_level(logging.INFO)
    changed = {"id": 5, "prompt": "question 5", "completion": "corrected"}
    copies = [{"id": f"copy {i}", "prompt": f"question {i}", "completion": "other"} for i in range(60)]
    near = [{"id": f"near {i}", "prompt": f"Question {i}!", "completion": "other"} for i in range(60)]
    source = write_rows([*topical(200), topical(1)[0], changed, *copies, *near, "{}"])
    prepared = prepare(run_config(source, eval_share=0.3, max_records=180, max_reject_share=0.5), store)
    profile = store.get_json(f"datasets/{prepared.dataset_id}/profile.json")
    splits, dropped, compared = profile["splits"], profile["dropped"], profile["near_duplicates"]
    assert (profile["rows"]["read"], profile["rows"]["rejected"]) == (323, 1)
    assert (dropped["duplicate"], dropped["superseded_by_same_id"]) == (1, 1)
    near_held_out, beyond = dropped["near_duplicate_of_eval"], dropped["over_max_records"]
    assert min(dropped["prompt_in_eval"], near_held_out, beyond, prepared.near_in_train) > 0
    kept = splits["train"]["records"] + splits["eval"]["records"]
    assert kept == 180
    assert profile["rows"]["read"] == profile["rows"]["rejected"] + sum(dropped.values()) + kept
    assert profile["extra_columns"] == {"topic": 201}
    assert "columns not read: topic (201 rows)" in caplog.text
    assert profile["sources"] == [{"source": source, "bytes": Path(source).stat().st_size, "rows": 323, "rejected": 1}]
    assert profile["rejected"][0]["reason"] == "prompt is missing"
    assert compared["in_train"] == prepared.near_in_train
    assert compared["most_are_near"][0]["records"] >= 1
    share = near_held_out / (near_held_out + prepared.train_records)
    assert compared["left_out_share"] == pytest.approx(share, abs=0.01)
    for number in (prepared.train_records, prepared.eval_records, near_held_out, beyond, prepared.near_in_train):
        assert f"{number} " in prepared.summary
    before = list(store.list(""))
    with pytest.raises(DataError, match=r"near what is held out .*data\.max_reject_share = 0\.05"):
        prepare(run_config(source, eval_share=0.3), store)
    assert list(store.list("")) == before


def test_a_label_that_is_held_out_and_never_trained_on_is_said(store: Store, write_rows: Write, run_config) -> None:
    config = run_config(write_rows(topical(200)), eval_share=0.3)
    known = prepare(config, store)
    assert known.never_trained == {}
    held_out = {each.prompt[0].content for each in load_split(store, known.uri, "eval")[:2]}
    changed = [{**row, "completion": "rare"} if row["prompt"] in held_out else row for row in topical(200)]
    prepared = prepare(run_config(write_rows(changed, name="changed.jsonl"), eval_share=0.3), store)
    evaluation = load_split(store, prepared.uri, "eval")
    assert prepared.never_trained == {"rare": sum(each.answer == "rare" for each in evaluation)} != {"rare": 0}
    assert prepared.summary.endswith("2 held-out records with labels that are never trained on: 'rare'")
    free = [{**row, "completion": f"answer {row['id']}"} for row in topical(100)]  # which are no labels
    assert prepare(run_config(write_rows(free), eval_share=0.3), store).never_trained == {}


def test_rows_without_the_group_that_the_config_names_are_rejects(store: Store, write_rows: Write, run_config) -> None:
    grouped = [{**row, "topic": row["id"] // 4} for row in topical(200)]
    config = run_config(write_rows([*grouped, *topical(1)]), group="topic", eval_share=0.3)
    profile = json.loads(store.get(f"datasets/{prepare(config, store).dataset_id}/profile.json"))
    assert sum(split["groups"] for split in profile["splits"].values()) == 51
    assert profile["extra_columns"] == {}
    with pytest.raises(DataError, match=r"no usable row among 200:\n  200 x site is missing"):
        prepare(run_config(write_rows(grouped), group="site"), store)


def test_records_of_several_sources_say_which_they_came_from(store: Store, write_rows: Write, run_config) -> None:
    parts = [write_rows(topical(100)[:50], "a.jsonl"), write_rows(topical(100)[50:], "b.jsonl")]
    prepared = prepare(run_config(parts, eval_share=0.3), store)
    for split in ("train", "eval"):
        for record in load_split(store, prepared.uri, split):
            assert record.source == parts[int(record.id) >= 50]
    alone = prepare(run_config(write_rows(topical(60)), eval_share=0.3), store)
    assert {record.source for record in load_split(store, alone.uri, "train")} == {""}


def test_the_profile_describes_each_split(store: Store, write_rows: Write, run_config: Config) -> None:
    prepared = prepare(run_config(write_rows(topical(200)), eval_share=0.3), store)
    profile = json.loads(store.get(f"datasets/{prepared.dataset_id}/profile.json"))
    train = load_split(store, prepared.uri, "train")
    described = profile["splits"]["train"]
    assert described["distinct_answers"] == 7
    assert sum(each["records"] for each in described["most_frequent_answers"]) == len(train)
    assert sum(each["share"] for each in described["most_frequent_answers"]) == pytest.approx(1, abs=1e-5)
    assert described["answer_chars"] == dict.fromkeys(("p0", "p10", "p50", "p90", "p99", "p100"), len("answer 1"))
    assert described["prompt_chars"]["p0"] == min(len(record.prompt[0].content) for record in train)
    assert described["prompt_chars"]["p100"] == max(len(record.prompt[0].content) for record in train)
    assert [sample["id"] for sample in described["samples"]] == [record.id for record in train[:3]]


def test_the_id_does_not_depend_on_paths_order_format_or_bad_rows(store: Store, write_rows: Write, run_config) -> None:
    shuffled = random.Random(0).sample(topical(100), 100)
    first = prepare(run_config(write_rows(topical(100))), store)
    before = list(store.list(""))
    parts = [write_rows(shuffled[:30], "z/b.jsonl"), write_rows([*shuffled[30:], "not json"], "a.jsonl")]
    second = prepare(run_config(parts), store)
    assert second.rejected == 1
    assert (second.dataset_id, first.created, second.created) == (first.dataset_id, True, False)
    assert list(store.list("")) == before


def test_a_refresh_keeps_every_evaluated_record_out_of_training(store: Store, write_rows: Write, run_config) -> None:
    first = prepare(run_config(write_rows(topical(100), "data/1.jsonl"), eval_share=0.3), store)
    write_rows(topical(300)[90:], "data/2.jsonl")
    second = prepare(run_config(str(Path(write_rows([], "data/3.jsonl")).parent), eval_share=0.3), store)
    evaluated = {record.id for record in load_split(store, first.uri, "eval")}
    assert first.dataset_id != second.dataset_id
    assert evaluated
    assert evaluated <= {record.id for record in load_split(store, second.uri, "eval")}
    assert second.train_records + second.eval_records == 300


def test_a_changed_file_is_not_loaded(store: Store, write_rows: Write, run_config: Config) -> None:
    prepared = prepare(run_config(write_rows(topical(100))), store)
    key = f"datasets/{prepared.dataset_id}/eval/part-00000.parquet"
    store.put(key, store.get(f"datasets/{prepared.dataset_id}/train/part-00000.parquet"))
    assert load_split(store, prepared.uri, "train")
    with pytest.raises(IntegrityError, match=r"eval/part-00000\.parquet"):
        load_split(store, prepared.uri, "eval")
    store.delete([f"datasets/{prepared.dataset_id}/manifest.json"])
    with pytest.raises(ObjectMissing):
        load_split(store, prepared.uri, "train")


def test_the_example_gives_the_2000_training_records_it_was_tuned_on(
    store: Store, run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icd10, "WHEELS", tmp_path)  # where no older release lies
    prepared = prepare(run_config("example://icd10", max_records=2300, eval_share=0.13), store)
    assert (prepared.train_records, prepared.eval_records, prepared.rejected) == (2001, 299, 0)
    assert prepared.dataset_id == "df653a87fa530816"


# A schedule's view of prepare: what is new since the last run that ended in a decision.


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
