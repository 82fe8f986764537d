import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.config.schema import RunConfig
from components.prepare import icd10
from components.prepare.dataset import load_split
from components.prepare.prepare import prepare
from components.shared import machine
from components.shared.errors import DataError, IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import Store

Write = Callable[..., str]
Config = Callable[..., RunConfig]


def rows(count: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i % 7}", "topic": "t"} for i in range(count)]


def test_on_a_machine_that_is_out_of_memory_nothing_is_begun(store, write_rows: Write, run_config, monkeypatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 400 * 2**20)
    with pytest.raises(DataError, match=r"^0\.3 GiB of memory are free for the records of data\.source"):
        prepare(run_config(write_rows(rows(99)), eval_share=0.2), store)


def test_prepare_writes_what_load_split_reads(store: Store, write_rows: Write, run_config: Config) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    chat = {"messages": [{"role": role, "content": f"c {role}"} for role in roles]}
    prepared = prepare(run_config(write_rows([*rows(99), chat]), eval_share=0.2), store)
    train, evaluation = (load_split(store, prepared.uri, split) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (prepared.train_records, prepared.eval_records)
    by_id = {record.id: record for record in train + evaluation}
    assert len(by_id) == 100
    assert (by_id["3"].prompt[0].content, by_id["3"].answer) == ("question 3", "answer 3")
    (conversation,) = [record for record in train + evaluation if len(record.prompt) > 1]
    assert [turn.role for turn in conversation.prompt] == ["system", "user", "assistant", "user"]
    assert conversation.answer == "c assistant"


def test_bad_rows_are_published_with_their_place_and_reason(store, write_rows, run_config, tmp_path: Path) -> None:
    source = write_rows([*rows(99), {"prompt": "p", "completion": ""}])
    prepared = prepare(run_config(source), store)
    store.download(f"datasets/{prepared.dataset_id}/rejects.parquet", tmp_path / "rejects.parquet")
    manifest = folders.read_manifest(store, f"datasets/{prepared.dataset_id}")
    files = {"train/part-00000.parquet", "eval/part-00000.parquet", "rejects.parquet", "profile.json"}
    assert (set(manifest.files), manifest.about["train_records"]) == (files, prepared.train_records)
    assert pq.read_table(tmp_path / "rejects.parquet").to_pylist() == [
        {"source": source, "line": 100, "reason": "completion is empty", "row": '{"prompt": "p", "completion": ""}'}
    ]


def test_profile_and_summary_account_for_every_row(store: Store, write_rows: Write, run_config: Config, caplog) -> None:
    caplog.set_level(logging.INFO)
    changed = {"id": 5, "prompt": "question 5", "completion": "corrected"}
    copies = [{"id": f"copy {i}", "prompt": f"question {i}", "completion": "other"} for i in range(60)]
    near = [{"id": f"near {i}", "prompt": f"Question {i}!", "completion": "other"} for i in range(60)]
    source = write_rows([*rows(200), rows(1)[0], changed, *copies, *near, "{}"])
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
    config = run_config(write_rows(rows(200)), eval_share=0.3)
    known = prepare(config, store)
    assert known.never_trained == {}
    held_out = {each.prompt[0].content for each in load_split(store, known.uri, "eval")[:2]}
    changed = [{**row, "completion": "rare"} if row["prompt"] in held_out else row for row in rows(200)]
    prepared = prepare(run_config(write_rows(changed, name="changed.jsonl"), eval_share=0.3), store)
    evaluation = load_split(store, prepared.uri, "eval")
    assert prepared.never_trained == {"rare": sum(each.answer == "rare" for each in evaluation)} != {"rare": 0}
    assert prepared.summary.endswith("2 held-out records with labels that are never trained on: 'rare'")
    free = [{**row, "completion": f"answer {row['id']}"} for row in rows(100)]  # which are no labels
    assert prepare(run_config(write_rows(free), eval_share=0.3), store).never_trained == {}


def test_rows_without_the_group_that_the_config_names_are_rejects(store: Store, write_rows: Write, run_config) -> None:
    grouped = [{**row, "topic": row["id"] // 4} for row in rows(200)]
    config = run_config(write_rows([*grouped, *rows(1)]), group="topic", eval_share=0.3)
    profile = json.loads(store.get(f"datasets/{prepare(config, store).dataset_id}/profile.json"))
    assert sum(split["groups"] for split in profile["splits"].values()) == 51
    assert profile["extra_columns"] == {}
    with pytest.raises(DataError, match=r"no usable row among 200:\n  200 x site is missing"):
        prepare(run_config(write_rows(grouped), group="site"), store)


def test_records_of_several_sources_say_which_they_came_from(store: Store, write_rows: Write, run_config) -> None:
    parts = [write_rows(rows(100)[:50], "a.jsonl"), write_rows(rows(100)[50:], "b.jsonl")]
    prepared = prepare(run_config(parts, eval_share=0.3), store)
    for split in ("train", "eval"):
        for record in load_split(store, prepared.uri, split):
            assert record.source == parts[int(record.id) >= 50]
    alone = prepare(run_config(write_rows(rows(60)), eval_share=0.3), store)
    assert {record.source for record in load_split(store, alone.uri, "train")} == {""}


def test_the_profile_describes_each_split(store: Store, write_rows: Write, run_config: Config) -> None:
    prepared = prepare(run_config(write_rows(rows(200)), eval_share=0.3), store)
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
    shuffled = random.Random(0).sample(rows(100), 100)
    first = prepare(run_config(write_rows(rows(100))), store)
    before = list(store.list(""))
    parts = [write_rows(shuffled[:30], "z/b.jsonl"), write_rows([*shuffled[30:], "not json"], "a.jsonl")]
    second = prepare(run_config(parts), store)
    assert second.rejected == 1
    assert (second.dataset_id, first.created, second.created) == (first.dataset_id, True, False)
    assert list(store.list("")) == before


def test_a_refresh_keeps_every_evaluated_record_out_of_training(store: Store, write_rows: Write, run_config) -> None:
    first = prepare(run_config(write_rows(rows(100), "data/1.jsonl"), eval_share=0.3), store)
    write_rows(rows(300)[90:], "data/2.jsonl")
    second = prepare(run_config(str(Path(write_rows([], "data/3.jsonl")).parent), eval_share=0.3), store)
    evaluated = {record.id for record in load_split(store, first.uri, "eval")}
    assert first.dataset_id != second.dataset_id
    assert evaluated
    assert evaluated <= {record.id for record in load_split(store, second.uri, "eval")}
    assert second.train_records + second.eval_records == 300


def test_a_changed_file_is_not_loaded(store: Store, write_rows: Write, run_config: Config) -> None:
    prepared = prepare(run_config(write_rows(rows(100))), store)
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
    assert prepared.dataset_id == "d980e810724629ab"
