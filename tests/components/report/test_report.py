import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from markupsafe import escape

from components.records import runs
from components.records.runs import Replayed
from components.records.steps import ROLES, RuleResult, StepRecord
from components.report import report
from components.report.html import SEARCH
from components.report.report import Beside, build_report, read_run, run_report
from components.report.run_files import RunFiles
from components.report.sections import next_steps, samples
from components.shared.errors import IntegrityError
from components.shared.paired import Bounds
from components.store.store import Store
from ray_jobs.scoring.answers import exact_match
from tests.components.report import example_runs
from tests.components.report.example_runs import CANDIDATE, CHAMPION, CONFIG, promoted_run, put, with_evaluation
from tests.components.report.page import Page
from tests.doubles.http_server import Answer, serving


def test_a_run_is_read_whole(store: Store) -> None:
    run = promoted_run()
    put(store, run)
    found = read_run(CONFIG, store, run.run_id)
    names = ("evaluation", "decision", "metrics", "profile", "lineage", "config_toml", "steps")
    assert [getattr(found, name) for name in names] == [getattr(run, name) for name in names]


def test_whose_answers_to_earlier_records_were_replayed_stands_with_the_data(store: Store) -> None:
    run = promoted_run()
    put(store, run)
    assert "Earlier records replayed" not in build_report(read_run(CONFIG, store, run.run_id))
    for version, kept, words in (
        ("v1", 20, "20 of 26 with right answers of v1"),
        ("v1", 0, "v1 answered none rightly"),
        (None, 0, "26 with their own answers"),
    ):
        found = Replayed(prepared_uri="s3://b/d1", dataset_uri="s3://b/d2", version=version, asked=26, kept=kept)
        runs.write(store, run.run_id, found)
        assert words in build_report(read_run(CONFIG, store, run.run_id))


def test_the_report_lies_with_its_run_beside_the_registry_s_pages_and_does_not_fail_for_them(store: Store) -> None:
    run, name = example_runs.held_run(), CONFIG.adapter.name
    put(store, run)
    uri = run_report(CONFIG, store, run.run_id, result={})
    assert uri == store.uri(f"runs/{run.run_id}/report.html")
    assert "production stays as it is" in store.get(store.key(uri)).decode()
    assert store.exists(f"pages/{name}.html")
    assert name in store.get("pages/index.html").decode()
    store.delete(["pages/index.html"])
    store.put(f"adapters/{name}/aliases/production.json", b"junk")
    assert run_report(CONFIG, store, run.run_id, result={}) == uri
    assert not store.exists("pages/index.html")


def test_a_run_that_left_nothing_still_gets_a_report(store: Store) -> None:
    page = store.get(store.key(run_report(CONFIG, store, "nothing", result={}))).decode()
    assert "no decision was made" in page
    assert "learning_rate = 0.001" in page  # the config is the caller's when the run stored none


def test_before_the_evaluation_the_steps_say_where_dataset_and_version_lie(store: Store) -> None:
    run = promoted_run()
    put(store, run)
    store.delete([f"runs/{run.run_id}/evaluation.json", f"runs/{run.run_id}/decision.json"])
    found = read_run(CONFIG, store, run.run_id)
    assert found.profile == run.profile
    assert found.lineage == run.lineage


def test_a_torn_last_line_is_left_out_and_a_torn_line_inside_is_an_error() -> None:
    assert runs.parse_metrics('{"step": 1}\n\n{"step": 2}\n{"st', origin="m") == [{"step": 1}, {"step": 2}]
    with pytest.raises(IntegrityError, match="m line 1"):
        runs.parse_metrics('{"st\n{"step": 2}\n', origin="m")


VARIANTS = (
    example_runs.promoted_run,
    example_runs.held_run,
    example_runs.first_run,
    example_runs.undecided_run,
    example_runs.failed_run,
    example_runs.skipped_run,
    example_runs.forgetful_run,
    example_runs.waiting_run,
    lambda: RunFiles(run_id="empty", adapter="icd10-chapters"),
)

Build = Callable[[], RunFiles]


@pytest.mark.parametrize("build", VARIANTS)
def test_every_page_is_whole_loads_nothing_and_runs_nothing_but_its_search(build: Build) -> None:
    html = build_report(build())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert [tag for tag, _ in page.tags].count("h1") == 1
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "img", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value == "data:," or value.startswith("#"), f"<{tag} {name}={value}>"
        assert tag != "svg" or attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    assert html.count("<script") == html.count(f"<script>{SEARCH}</script>") <= 1
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", page.text)
    ids = {attributes["id"] for tag, attributes in page.tags if tag == "h2" and "id" in attributes}
    links = {str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a" and "href" in attributes}
    assert links == (ids if len(ids) > 3 else set())


@pytest.mark.parametrize(
    ("result", "words", "other"),
    [
        ({}, "Nothing was promoted: the alias production is as it was", "did move"),
        ({"event_uri": "s3://b/e"}, "The alias production did move", "Nothing was promoted"),
    ],
)
def test_a_failed_promotion_says_whether_the_alias_moved(result: dict[str, Any], words: str, other: str) -> None:
    *before, last = example_runs.steps("prepare", "finetune", "evaluate", "gate", "promote", failed="promote")
    last = last.model_copy(update={"result": {**last.result, **result}})
    text = Page(build_report(replace(promoted_run(), steps=[*before, last]))).text
    assert "the promote step failed" in text
    assert words in text
    assert other not in text
    assert "a new version is in production" not in text


def ungated_run() -> RunFiles:
    return replace(promoted_run(), steps=example_runs.steps("prepare", "finetune", "evaluate", "gate"))


@pytest.mark.parametrize(
    ("build", "words", "absent"),
    [
        (
            promoted_run,
            "a new version is in production|the exact answer 72.0 % of the time, against 68.3 % for production's|"
            f"loss (lower is better) is 0.912, against 0.951|to {CANDIDATE} now, and pointed to {CHAMPION} before it|"
            "74.3 %|2.489|1.384|3.7 points better|0.039 better|between +0.039 and +0.039",
            "✕ failed",
        ),
        (ungated_run, "a new version may go to production|has not been moved by this run", ""),
        (
            example_runs.held_run,
            f"production stays as it is|Are prompts and answers shuffled|Production keeps {CHAMPION}.|1.237 worse",
            "",
        ),
        (
            example_runs.waiting_run,
            "Held: needs approval|A person has to approve every version of this adapter.|? needs approval|"
            f"Production keeps {CHAMPION} until a person approves {CANDIDATE}: fineloop adapters approve",
            "",
        ),
        (
            example_runs.first_run,
            "There was no version in production when this run compared|and pointed to nothing before it",
            "against production",
        ),
        (example_runs.undecided_run, "no decision was made|no gate was asked to decide", ""),
        (
            example_runs.failed_run,
            "the finetune step failed|worker 1 was lost: out of memory|no lineage record",
            "How the candidate compares|The gate's rules|Sample answers|Training|Data ",
        ),
        (example_runs.skipped_run, "Skipped|nothing new since run 2026-11-25-0200|What is new counts again", ""),
    ],
)
def test_each_outcome_is_told_and_no_section_is_without_content(build: Build, words: str, absent: str) -> None:
    text = Page(build_report(build())).text
    assert [each for each in words.split("|") if each not in text] == []
    assert [each for each in absent.split("|") if each and each in text] == []


@pytest.mark.parametrize(
    ("kind", "message", "commands"),
    [
        ("JobError", "worker 1 was lost", ["-c .fineloop/runs/r/config.toml --run-id r"]),
        (
            "DataError",
            "much is near, more than data.max_reject_share = 0.05 allows:\n  5 x near 'a b'\nName it in data.group.",
            [f"-c .fineloop/runs/r/config.toml --set {key}=VALUE" for key in ("data.max_reject_share", "data.group")],
        ),
        ("DataError", "no rows in s3.data.jsonl", ["-c .fineloop/runs/r/config.toml"]),
    ],
)
def test_a_failed_run_keeps_the_lines_of_its_error_and_says_what_to_do_now(kind: str, message: str, commands) -> None:
    failed = StepRecord(
        step="prepare", status="failed", started_at="2026-11-26T02:00:00+00:00", seconds=1.0,
        result={"error": {"kind": kind, "message": message}},
    )  # fmt: skip
    run = RunFiles(run_id="r", adapter="sums", steps=[failed])
    html = build_report(run)
    assert f"<li>{escape(message)}</li>" in html
    assert [command for command, _ in next_steps(run)] == [f"fineloop run {each}" for each in commands]
    text = Page(html).text
    assert "What to do now" in text
    assert "no measurements" not in text


def test_times_from_one_step_to_the_next_are_told_where_they_were_recorded() -> None:
    run = promoted_run()
    finetune = run.step("finetune")
    assert finetune is not None
    for words in ("First training step", "after training"):
        assert words not in Page(build_report(run)).text
    times = {
        "began_at": (datetime.fromisoformat(finetune.started_at) + timedelta(seconds=3)).isoformat(),
        "trained_at": "2026-11-24T02:03:00+00:00",
        "until_first_step": [{"part": "data", "seconds": 2.0}, {"part": "workers start", "seconds": 4.5}],
    }
    timed = finetune.model_copy(update={"result": {**finetune.result, **times}})
    run = with_evaluation(run, first_scored_at="2026-11-24T02:03:09.250000+00:00")
    text = Page(build_report(replace(run, steps=[timed if step is finetune else step for step in run.steps]))).text
    assert "First training step after 9.5 s: Ray job 3 s, data 2 s, workers start 4.5 s" in text
    assert "First record compared 9.2 s after training" in text


def test_data_origin_and_times_are_told() -> None:
    text = Page(build_report(promoted_run())).text
    told = (
        "completion is empty", "repeated 11", "Columns not read source", "Neoplasms", "10.4 %", "224 (10.1 %)",
        "near “ICD-10 chapter: Pressure ulcer …” 6", "6b0f2f7c1f9a40de2c4b8a3f0f3b62d2c6ce9a11", "51be" * 16,
        CONFIG.digest, "2.13.0", "3 min 34 s", "6.4 s", "learning_rate = 0.001", "24 November 2026, 02:00 UTC, by ann",
    )  # fmt: skip
    assert [words for words in told if words not in text] == []


def test_every_text_from_outside_is_escaped() -> None:
    texts: list[str] = []

    def evil() -> str:
        texts.append(f"<script>alert('x')</script>\"'><img src=https://example.com onerror=alert(1)>&amp;{len(texts)}.")
        return texts[-1]

    run = promoted_run()
    rule = RuleResult(name="new_one", field=evil(), title=evil(), bound_text=evil(), passed=False, text=evil())
    rejected, answers = {"reason": evil(), "rows": 1, "example": evil()}, {"answer": evil(), "records": 1, "share": 0.5}
    split = {"records": 2, "most_frequent_answers": [answers]}
    profile = {"rejected": [rejected], "sources": [{"source": evil(), "rows": 1}]}
    profile |= {"extra_columns": {evil(): 1}, "splits": {"train": split}}
    run = with_evaluation(run, samples=[{"id": "r", **{role: evil() for role in ("prompt", "reference", *ROLES)}}])
    run = example_runs.with_decision(run, reasons=(evil(),), rules=(rule,))
    lineage = {evil(): evil(), "recipe": {evil(): [evil()]}}
    names = {name: evil() for name in ("config_toml", "run_id", "adapter", "alias")}
    step = StepRecord(step=evil(), status="failed", started_at="2026-11-24T02:00:00Z", seconds=1.0)
    html = [
        build_report(replace(run, profile={**(run.profile or {}), **profile}, lineage=lineage, **names)),
        build_report(replace(run, steps=[step])),
    ]
    assert not any(tag in page for page in html for tag in ("<script>alert", "<img"))
    shown = " ".join(Page(page).text for page in html)
    assert [text for text in texts if " ".join(text.split()) not in shown] == []  # shown, as text


def test_right_and_wrong_answers_are_marked_and_changes_named() -> None:
    text = Page(build_report(promoted_run())).text
    assert "Among the 8 shown: Base model 0 of 8, Production 5 of 8, Candidate 6 of 8." in text
    assert text.count("▲ newly right") == 2
    assert text.count("▼ newly wrong") == 1
    assert "(empty answer)" in text


def test_a_sample_is_right_as_the_metric_counts_it() -> None:
    """In another Unicode form too: an e with an accent is one code point, or two."""
    sample = {"id": "r", "prompt": [], "base": "", "reference": "\u00c9pilepsie", "candidate": "E\u0301pilepsie"}
    (shown, *_) = samples(with_evaluation(promoted_run(), samples=[sample]))
    assert [answer.right for answer in shown.answers if answer.role == "candidate"] == [True]
    assert exact_match(sample["candidate"], sample["reference"]) == 1


def test_a_conversation_shows_who_spoke_and_a_long_text_is_cut() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x" * 5000}]
    sample = {"id": "r", "prompt": turns, "reference": "", "candidate": ""}
    text = Page(build_report(with_evaluation(promoted_run(), samples=[sample]))).text
    assert "system Be brief. user xxx" in text
    assert "… (4,100 more characters)" in text


def test_a_long_training_stays_a_small_page() -> None:
    run = replace(promoted_run(), metrics=example_runs.training(num_steps=20_000))
    assert len(build_report(run)) < 120_000


@pytest.mark.parametrize("value", [None, float("nan")])
def test_numbers_that_were_not_measured_are_words(value: Any) -> None:
    run = example_runs.held_run()
    measured = example_runs.evaluation("r", dict.fromkeys(("loss", "exact_match", "prompt_gain"), value), None)
    text = Page(build_report(replace(run, evaluation=measured, decision=example_runs.decision(measured)))).text
    assert "cannot be checked" in text
    assert "not measured" in text


@pytest.mark.parametrize(
    ("nll", "limit", "words"),
    [
        (455.0, None, "its loss is 1.150 higher, so that it gives the right token 68 % less chance. No rule limits"),
        (455.0, 0.5, "68 % less chance. The gate's limit (worse by at most 0.5) is not kept."),
        (340.1, 0.5, "Nothing shows as forgotten: on general text the candidate's loss is 3.401, and the base's"),
    ],
)
def test_forgetting_is_said_in_words_and_is_bad_news_where_a_rule_says_so(nll: float, limit, words: str) -> None:
    html = build_report(example_runs.decided(example_runs.forgetful_run(nll), worse_on_general_text_by=limit))
    assert words in Page(html).text.replace("\u00a0", " ")
    worse = re.search(r'class="num worse" data-label="against base">1\.150 worse', html)
    assert bool(worse) == (nll == 455.0 and limit is not None)


# What an OpenLineage server receives of a run, by OpenLineage's own client, over HTTP.


@dataclass
class Server:
    """Takes events, and answers as it is set to."""

    answer: int = 201
    received: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    """Path, Authorization and event."""

    def handle(self, _verb: str, path: str, _query: Any, body: bytes, headers: Mapping[str, str]) -> Answer:
        self.received.append((path, headers["Authorization"], json.loads(body)))
        return self.answer, {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the environment names, as OpenLineage's documentation says."""
    made = Server()
    with serving(made.handle) as url:
        monkeypatch.setenv("OPENLINEAGE_URL", url)
        monkeypatch.setenv("OPENLINEAGE_API_KEY", "the-key")
        yield made


def test_a_run_that_succeeded_is_sent_from_its_sources_base_dataset_and_parent_to_its_version(server, store) -> None:
    report.emit(CONFIG, store, promoted_run())
    assert {(path, key) for path, key, _ in server.received} == {("/api/v1/lineage", "Bearer the-key")}
    start, complete = (event for _, _, event in server.received)
    # The keys that RunEvent requires, in spec/OpenLineage.json 2-0-2, as BaseEvent does.
    for event in (start, complete):
        assert {"eventTime", "producer", "schemaURL", "run", "job"} <= event.keys()
        assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        assert event["job"]["namespace"] == "fineloop"
        assert event["job"]["name"] == CONFIG.adapter.name
        assert event["job"]["facets"].keys() == {"jobType"}  # nothing of the folder that this runs in
    assert [start["eventType"], complete["eventType"]] == ["START", "COMPLETE"]
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert start["eventTime"] < complete["eventTime"]
    bucket = f"s3://{store.bucket}"
    named = {(each["namespace"], each["name"]) for each in complete["inputs"]}
    assert (bucket, f"{store.prefix}/datasets/{example_runs.DATASET}") in named
    assert ("s3://fineloop", f"adapters/{CONFIG.adapter.name}/versions/{CHAMPION}") in named
    assert ("fineloop", CONFIG.model.base) in named
    (output,) = complete["outputs"]
    key = f"{store.prefix}/adapters/{CONFIG.adapter.name}/versions/{CANDIDATE}"
    assert (output["namespace"], output["name"]) == (bucket, key)
    assert output["facets"]["version"]["datasetVersion"] == CANDIDATE
    assert start["outputs"] == []


def test_a_run_that_failed_says_where_and_why(server: Server, store: Store) -> None:
    error = {"kind": "DataError", "message": "no record is usable"}
    ended = {"status": "failed", "started_at": "2026-11-24T02:00:00+00:00", "seconds": 1, "result": {"error": error}}
    step = StepRecord(step="prepare", **ended)
    report.emit(CONFIG, store, replace(promoted_run(), steps=[step], lineage=None, evaluation=None, decision=None))
    _, _, event = server.received[-1]
    assert event["eventType"] == "FAIL"
    assert event["run"]["facets"]["errorMessage"]["message"] == "prepare: no record is usable"
    assert event["outputs"] == []
    assert event["inputs"] == server.received[0][2]["inputs"] != []


def test_a_server_that_refuses_fails_no_run(server: Server, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = 403
    report.emit(CONFIG, store, promoted_run())
    assert "OpenLineage did not get the events of this run: 403" in caplog.text
    assert "the-key" not in caplog.text


def test_a_run_is_known_by_its_id_or_address_and_nothing_is_sent_where_no_server_is_named(store, monkeypatch) -> None:
    kubeflow = "7506d98d-86d6-4032-ad2c-97c8dca660a4"
    assert report.run_uuid(store, kubeflow) == kubeflow
    assert report.run_uuid(store, "r1") == report.run_uuid(store, "r1") != report.run_uuid(store, "r2")
    for name in report.CONFIGURED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(report, "events_of", None)
    report.emit(CONFIG, store, promoted_run())


def test_datasets_are_named_as_openlineage_names_them() -> None:
    """As openlineage.io/docs/spec/naming has it for S3, GCS and the local file system."""
    named = {
        "s3://intake/2026/day.jsonl": ("s3://intake", "2026/day.jsonl"),
        "s3://intake": ("s3://intake", "/"),
        "gs://intake/day.jsonl": ("gs://intake", "day.jsonl"),
        "/data/day.jsonl": ("file", "/data/day.jsonl"),
        "org/base": ("fineloop", "org/base"),
    }
    assert {reference: report._named(reference) for reference in named} == named


def test_beside_another_run_a_gain_is_drawn_only_between_two_finite_bounds() -> None:
    gains = {"loss": Bounds(0.1, -math.inf, 0.2, 0.05, 300, 300), "exact_match": Bounds(0.1, 0.0, 0.2, 0.05, 300, 300)}
    (drawn,) = Beside("other", 300, 0.95, gains, []).intervals
    assert [(gain.lower, gain.upper) for gain in drawn.gains] == [(0.0, 0.2)]
