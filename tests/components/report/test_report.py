import json
from collections.abc import Mapping
from typing import Any

import pytest

from components.records import runs
from components.records.runs import Replayed
from components.registry.event_log import append_event
from components.report.comparison import past_decisions
from components.report.page import build_report
from components.report.report import parse_metrics, read_run, run_report
from components.report.run_files import RunFiles
from components.shared.errors import IntegrityError
from components.store.store import Store
from tests.components.report import example_runs
from tests.components.report.example_runs import CANDIDATE, CONFIG, DATASET


def put(store: Store, run: RunFiles) -> None:
    folder = f"runs/{run.run_id}"
    store.put(f"{folder}/config.toml", run.config_toml.encode())
    store.put(f"{folder}/metrics.jsonl", "".join(json.dumps(record) + "\n" for record in run.metrics).encode())
    for record in (run.evaluation, run.decision, *run.steps):
        if record is not None:
            runs.write(store, run.run_id, record)
    documents: dict[str, Mapping[str, Any] | None] = {
        f"datasets/{DATASET}/profile.json": run.profile,
        f"adapters/{CONFIG.adapter.name}/versions/{CANDIDATE}/lineage.json": run.lineage,
    }
    for key, value in documents.items():
        if value is not None:
            store.put_json(key, value)


def test_a_run_is_read_whole(store: Store) -> None:
    run = example_runs.promoted_run()
    put(store, run)
    found = read_run(CONFIG, store, run.run_id)
    assert found.evaluation == run.evaluation
    assert found.decision == run.decision
    assert found.metrics == run.metrics
    assert found.profile == run.profile
    assert found.lineage == run.lineage
    assert found.config_toml == run.config_toml
    assert found.steps == run.steps


@pytest.mark.parametrize(
    ("version", "kept", "words"),
    [
        ("v1", 20, "20 of 26 with right answers of v1, the others with their own"),
        ("v1", 0, "26 with their own answers: v1 answered none rightly"),
        (None, 0, "26 with their own answers: nothing was in production"),
    ],
)
def test_whose_answers_to_earlier_records_were_replayed_stands_with_the_data(
    store: Store, version: str | None, kept: int, words: str
) -> None:
    run = example_runs.promoted_run()
    put(store, run)
    assert "Earlier records replayed" not in build_report(read_run(CONFIG, store, run.run_id))
    found = Replayed(prepared_uri="s3://b/d1", dataset_uri="s3://b/d2", version=version, asked=26, kept=kept)
    runs.write(store, run.run_id, found)
    assert words in build_report(read_run(CONFIG, store, run.run_id))


def test_earlier_decisions_are_drawn_with_their_intervals_the_newest_first(store: Store) -> None:
    run = example_runs.held_run()
    put(store, run)
    assert run.decision is not None
    for number, alias in enumerate(["production", "staging", "production"]):
        decision = run.decision.model_copy(update={"run_id": f"before-{number}", "alias": alias})
        runs.write(store, decision.run_id, decision)
        append_event(store, CONFIG.adapter.name, "refused", {"alias": alias, "run_id": decision.run_id})
    append_event(store, CONFIG.adapter.name, "refused", {"alias": "production", "run_id": "removed-since"})
    append_event(store, CONFIG.adapter.name, "refused", {"alias": "production", "run_id": run.run_id})
    found = read_run(CONFIG, store, run.run_id)
    assert [each.run_id for each in found.decided_before] == ["before-2", "before-0"]
    drawn = past_decisions(found)
    assert drawn is not None
    assert [(row.name, row.about, row.bad) for row in drawn.rows] == [
        (run.run_id, "hold", True),
        ("before-2", "hold", True),
        ("before-0", "hold", True),
    ]
    assert len({row.position for row in drawn.rows}) == 1
    newest = drawn.rows[0]
    assert newest.bound is not None
    assert newest.position < newest.bound < newest.zero
    assert "Decisions so far" in build_report(found)
    assert past_decisions(run) is None
    run_report(CONFIG, store, run.run_id)  # leaves the index
    asked: list[str] = []
    store._client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.url) or None)
    again = read_run(CONFIG, store, run.run_id)
    assert past_decisions(again) == drawn
    assert not any("before-" in url or "/events/" in url for url in asked)


def test_the_report_lies_with_its_run(store: Store) -> None:
    run = example_runs.held_run()
    put(store, run)
    uri = run_report(CONFIG, store, run.run_id)
    assert uri == store.uri(f"runs/{run.run_id}/report.html")
    page = store.get(store.key(uri)).decode()
    assert "production stays as it is" in page
    assert run_report(CONFIG, store, run.run_id) == uri


def test_with_the_report_the_registry_s_pages_are_written_and_a_report_does_not_fail_for_them(store: Store) -> None:
    run = example_runs.held_run()
    put(store, run)
    name = CONFIG.adapter.name
    run_report(CONFIG, store, run.run_id)
    assert store.exists(f"pages/{name}.html")
    assert name in store.get("pages/index.html").decode()
    store.delete(["pages/index.html"])
    store.put(f"adapters/{name}/aliases/production.json", b"junk")
    assert store.exists(store.key(run_report(CONFIG, store, run.run_id)))
    assert not store.exists("pages/index.html")


def test_a_run_that_left_nothing_still_gets_a_report(store: Store) -> None:
    page = store.get(store.key(run_report(CONFIG, store, "nothing"))).decode()
    assert "no decision was made" in page
    assert "learning_rate = 0.001" in page  # the config is the caller's when the run stored none


def test_before_the_evaluation_the_steps_say_where_dataset_and_version_lie(store: Store) -> None:
    run = example_runs.promoted_run()
    put(store, run)
    store.delete([f"runs/{run.run_id}/evaluation.json", f"runs/{run.run_id}/decision.json"])
    found = read_run(CONFIG, store, run.run_id)
    assert found.profile == run.profile
    assert found.lineage == run.lineage


def test_a_torn_last_line_is_left_out_and_a_torn_line_inside_is_an_error() -> None:
    assert parse_metrics('{"step": 1}\n\n{"step": 2}\n{"st', origin="m") == [{"step": 1}, {"step": 2}]
    with pytest.raises(IntegrityError, match="m line 1"):
        parse_metrics('{"st\n{"step": 2}\n', origin="m")
