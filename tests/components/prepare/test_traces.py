"""Logged requests and the feedback on them, as records: each format, each rule, and ten thousand turns."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from components.config.schema import RunConfig
from components.prepare import feedback, traces
from components.prepare.audit import draw, name_of_draw
from components.prepare.dataset import Record, exposure_of, load_split
from components.prepare.prepare import prepare, prepare_if_new, preview
from components.prepare.sources import find_sources
from components.prepare.split import judges_of
from components.prepare.workspace import position
from components.registry import between_runs
from components.registry.between_runs import require_none_erased, user_hash
from components.report.sections import data_profile
from components.shared.errors import DataError
from components.step.step import StepRun
from components.store.store import Store
from tests.components.prepare import logged

Write = Callable[..., str]
VERSION, OTHER = "v" + "1" * 15, "v" + "2" * 15
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
ANSWER = {"role": "assistant", "content": "own"}


def request(number: int = 0, answer: str = "own", **changes: Any) -> dict[str, Any]:
    """A log's row, in the nested form; `changes` replace its fields."""
    asked = [ASKED[0], {"role": "user", "content": f"question {number} of {number * 7919 % 10007}"}]
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    about = {"id": f"r{number}", "model": f"icd@{VERSION}", "user": f"user {number}"}
    return {**about, "request": {"messages": asked}, "response": {"choices": [choice]}, **changes}


@pytest.fixture
def of_rows(write_rows: Write, run_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A config of an adapter `icd` whose data are these rows, all that were logged, and this feedback."""

    def build(rows: Sequence[Any], feedback: Sequence[Any] = (), **data: Any) -> RunConfig:
        named = {"feedback": write_rows(list(feedback), "feedback.jsonl")} if feedback else {}
        options = {
            "eval_share": 0.3,
            "near_duplicates": 0.0,
            "max_reject_share": 1.0,
            "whole_log": True,
            **named,
            **data,
        }
        config = run_config(write_rows(list(rows), "log.jsonl"), **options)
        return config.model_copy(update={"adapter": config.adapter.model_copy(update={"name": "icd"})})

    return build


def prepared(config: RunConfig) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """The profile, the records to train on, and those held out."""
    with preview(config, find_sources(config.data.source)) as (profile, split):
        return profile, list(split.train), list(split.evaluation)


# Each format.

LITELLM = {  # what StandardLoggingPayload holds
    **{"id": "r", "trace_id": "S", "call_type": "acompletion", "stream": False, "status": "success"},
    **{"model": f"hosted_vllm/icd@{VERSION}", "model_group": "icd", "end_user": "ada", "messages": ASKED},
    "response": {
        **{"id": "r", "object": "chat.completion", "model": f"icd@{VERSION}"},
        "choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}],
    },
    "model_parameters": {"temperature": 0},
}
LANGFUSE = {  # an enriched observation, whose input and output are text
    **{"id": "r", "trace_id": "t", "type": "GENERATION", "session_id": "S", "user_id": "ada"},
    **{"provided_model_name": VERSION, "input": json.dumps(ASKED), "output": json.dumps(ANSWER)},
}
PARTS = [{"type": "reasoning", "content": "hm"}, {"type": "text", "content": "own"}]
OTEL = {
    **{"gen_ai.response.id": "r", "gen_ai.request.model": "icd@production", "gen_ai.response.model": f"icd@{VERSION}"},
    **{"gen_ai.conversation.id": "S", "user.id": "ada", "gen_ai.response.finish_reasons": ["stop"]},
    "gen_ai.system_instructions": [{"type": "text", "content": "s"}],
    "gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "q"}]}],
    "gen_ai.output.messages": [{"role": "assistant", "parts": PARTS, "finish_reason": "stop"}],
}
REQUEST = {"messages": ASKED}
RESPONSE = {"id": "r", "model": VERSION, "choices": [{"message": ANSWER, "finish_reason": "stop"}]}
ABOUT = {"user": "ada", "session_id": "S"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "own"}]}
FORMATS = {
    "stored completion": {**ABOUT, **RESPONSE, "input": ASKED},
    "Responses": {**ABOUT, "id": "r", "object": "response", "model": VERSION, "instructions": "s", "input": "q"}
    | {"output": [{"type": "reasoning", "summary": []}, SAID]},
    "Helicone": {**ABOUT, "request_id": "h", "request_body": REQUEST, "response_body": RESPONSE},
    "LangSmith": {**ABOUT, "id": "r", "run_type": "llm", "inputs": REQUEST, "outputs": RESPONSE},
    "spend log": {**ABOUT, "request_id": "x", "messages": ASKED, "response": RESPONSE},
    "MLflow": {**ABOUT, "trace_id": "t", "request": json.dumps(REQUEST), "response": json.dumps(RESPONSE)},
    "bodies": {**ABOUT, "timestamp": "2026-11-01T10:00:00Z", "request": REQUEST, "response": RESPONSE},
    "ClickHouse": {"TraceId": "t", "SpanName": "chat", "SpanAttributes": OTEL},
    "OTel console": {**ABOUT, "name": "chat", "context": {"span_id": "0x1"}, "attributes": OTEL},
    "nested": request(id="r", user="ada", session_id="S", request={"messages": ASKED}),
    "Ray Serve": request(id="r", user="ada", session_id="S", request={"messages": ASKED}, model=f"org/model:{VERSION}"),
    "choices": {"id": "r", "model": VERSION, "messages": ASKED, "user": "ada", "session_id": "S"}
    | {"choices": [{"message": ANSWER, "finish_reason": "stop"}]},
    "LiteLLM": LITELLM,
    "Langfuse": LANGFUSE,
    "OTel": OTEL,
    "OTel as JSON text": {
        name: json.dumps(value) if isinstance(value, list) else value for name, value in OTEL.items()
    },
    "OTel event": {"event_name": "gen_ai.client.inference.operation.details", "attributes": OTEL},
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_says_the_same(name: str, kind: str, of_rows: Callable[..., RunConfig], tmp_path: Path) -> None:
    one = tmp_path / f"one.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([FORMATS[name]]), one)
    else:
        one.write_text(json.dumps(FORMATS[name]))
    config = of_rows([request(n) for n in range(1, 20)], rated(["", *range(1, 20)], edited="e"))
    data = config.data.model_copy(update={"source": [str(one), config.data.source]})
    _, train, held_out = prepared(config.model_copy(update={"data": data}))
    (record,) = (each for each in (*train, *held_out) if each.id == "r")
    assert (record.served_by, record.session, record.user) == (VERSION, "S", user_hash("ada"))
    assert (record.answer, record.origin) == ("e", "edited")
    assert [(turn.role, turn.content) for turn in record.prompt] == [("system", "s"), ("user", "q")]


@pytest.mark.parametrize("group", ["session_id", "session", "user", "ward"])
def test_a_group_may_be_named_and_no_name_of_a_user_is_kept(group: str, of_rows) -> None:
    rows = [request(n, user=f"user {n % 20}", session_id=f"s{n % 25}", metadata={"ward": n % 30}) for n in range(90)]
    _, train, held_out = prepared(of_rows(rows, rated(range(90), edited="e"), group=group, max_rows_per_rater=0))
    number = {"user": 20, "ward": 30}.get(group, 25)
    assert number // 2 < len({each.group for each in (*train, *held_out)}) <= number
    assert {each.user for each in train} <= {user_hash(f"user {n}") for n in range(20)}
    assert not any("user" in each.group for each in train)


@pytest.mark.parametrize("seed", range(3))
def test_no_row_and_no_feedback_whatever_it_holds_ends_a_preparation(seed: int, of_rows) -> None:
    rng = random.Random(seed)
    odd: list[Any] = [None, True, 3, 1e400, "x", "\ud800", "{", "[3]", [], [3], {}, {"a": 1}]
    odd += [[{"type": 3}], [{"parts": [3]}], [{"parts": ["text"]}]]

    def broken(row: dict[str, Any]) -> dict[str, Any]:
        for key in rng.sample([*row], k=min(2, len(row))):
            value = row[key]
            is_nested = isinstance(value, dict) and value and rng.random() < 0.7
            row = {**row, key: broken(value) if is_nested else rng.choice(odd)}
        return row

    rows = [request(n) for n in range(60)]
    rows += [broken({**rng.choice([*FORMATS.values()]), "id": f"b{n}"}) for n in range(30)]
    vote = {"score": 1, "edited": "x", "time": 1, "rater": "a"}
    said = [
        *rated(range(60), edited="e"),
        *audited(range(0, 60, 3), label="e"),
        *(broken({"response_id": f"r{n}", **vote}) for n in range(20)),
    ]
    profile, train, held_out = prepared(of_rows(rows, said))
    dropped = sum(profile["dropped"].values())
    assert profile["rows"]["read"] == profile["rows"]["rejected"] + dropped + len(train) + len(held_out)


def test_a_question_and_what_a_model_answered_at_a_time_is_a_log() -> None:
    row = {"question": "q", "response": "own", "model": VERSION, "created_at": "2026-11-01T10:00:00Z"}
    assert traces.are_traces(row)
    turn = traces.as_turn(row)
    assert (turn["messages"], turn["models"]) == ([{"role": "user", "content": "q"}, ANSWER], [VERSION])
    assert not traces.are_traces({"question": "q", "response": "own"})


def test_the_names_of_opentelemetry_are_its_own() -> None:
    names = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    theirs = {each for each in traces.COLUMNS if each.startswith("gen_ai.")} | {"gen_ai.evaluation.score.label"}
    assert theirs | {"gen_ai.evaluation.name", "gen_ai.evaluation.score.value"} <= names


# What is easily forgotten: the rows, the feedback, and what comes of them.

CUT = {"choices": [{"message": ANSWER, "finish_reason": "length"}]}
CHUNK = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "ow"}, "finish_reason": None}]}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED = {"choices": [{"message": ASKS, "finish_reason": "stop"}]}


def rated(numbers: Iterable[int | str], **said: Any) -> list[dict[str, Any]]:
    return [{"response_id": f"r{number}", **said} for number in numbers]


def audited(numbers: Iterable[int], label: str = "l") -> list[dict[str, Any]]:
    """The rows of an audit that drew these answers."""
    names = [f"r{number}" for number in numbers]
    return [{"response_id": name, "label": label, "audit": name_of_draw(names)} for name in names]


def test_what_people_chose_is_trained_on_and_never_held_out(of_rows) -> None:
    rows = [request(n) for n in range(120)]
    chosen = [*rated(range(30), score=1), *rated(range(30, 60), edited="e"), *rated(range(60, 90), label="l")]
    with pytest.raises(DataError, match=r"nothing of the log may judge: .*`fineloop data audit \d+ -c CONFIG`"):
        prepared(of_rows(rows, chosen))
    profile, train, held_out = prepared(of_rows(rows, [*chosen, *audited(range(90, 120))], whole_log=False))
    assert {each.origin for each in train} == {"own", "edited", "labelled"}
    assert {(each.origin, each.drawn) for each in held_out} == {("labelled", "audit")}
    assert profile["logged"]["judge"] == {"audit": len(held_out)}
    assert profile["logged"]["reserved"] > 0


def test_outcomes_and_a_log_that_people_judged_whole_may_judge(of_rows) -> None:
    rows = [request(n) for n in range(90)]
    judged = [*rated(range(60), score=1), *rated(range(60, 90), edited="e")]
    held_out = prepared(of_rows(rows, judged, whole_log=True))[2]
    assert {(each.origin, each.drawn) for each in held_out} == {("own", "census"), ("edited", "census")}
    with pytest.raises(DataError, match="nothing of the log may judge"):
        prepared(of_rows(rows, judged[:-1], whole_log=True))  # nobody judged the last
    held_out = prepared(of_rows(rows, [*judged, *rated(range(20), outcome="o")], whole_log=False))[2]
    assert {(each.origin, each.drawn) for each in held_out} == {("labelled", "outcome")}


def test_an_audit_judges_only_once_it_is_whole(of_rows) -> None:
    rows = [request(n) for n in range(90)]
    said, drawn = rated(range(40), edited="e"), audited(range(50, 90))
    assert prepared(of_rows(rows, [*said, *drawn]))[2]
    open_rows = [{**row, "label": ""} for row in drawn[:10]]
    for some, why in (
        (drawn[1:], "is not the draw that it was: 39 of its rows"),
        ([*open_rows, *drawn[10:]], "lacks 10 labels"),
    ):
        with pytest.raises(DataError, match="nothing of the log may judge"):
            prepared(of_rows(rows, [*said, *some]))
        plain = [{"prompt": f"{n}", "completion": "a"} for n in range(40)]
        profile, _, held_out = prepared(of_rows([*rows, *plain], [*said, *some]))
        assert not any(each.origin for each in held_out)
        assert why in str(profile["logged"]["warnings"])
    few = [{**row, "label": ""} for row in drawn[:4]]
    assert prepared(of_rows(rows, [*said, *few, *drawn[4:]]))[0]["logged"]["feedback"]["unusable"] == {}


def test_an_audited_answer_judges_though_the_same_words_were_rated_good_elsewhere(of_rows) -> None:
    """Else an audit would lose what production had right, wherever people had liked it before."""
    asked = [{"role": "user", "content": f"question {n % 60}"} for n in range(120)]
    rows = [request(n, request={"messages": [asked[n]]}) for n in range(120)]
    said = [*rated(range(60), score=1), *audited(range(60, 120), label="own")]
    held_out = prepared(of_rows(rows, said, whole_log=False))[2]
    places = {n: position(hashlib.sha256(f"id:r{n}".encode()).digest()) for n in range(60, 120)}
    assert {each.id for each in held_out} == {f"r{n}" for n, place in places.items() if place < 0.3}


def test_an_answer_that_nobody_changed_is_the_models_own(of_rows) -> None:
    rows = [request(n, "their  own") for n in range(90)]
    said = [*rated(range(30), edited=" their own"), *rated(range(30, 60), label="their own ")]
    _, train, held_out = prepared(of_rows(rows, [*said, *audited(range(60, 90), label="their own")]))
    assert {(each.origin, each.answer) for each in (*train, *held_out)} == {("own", "their  own")}


def test_one_edit_does_not_outweigh_those_who_like_the_answer(of_rows) -> None:
    liked = [{"response_id": f"r{n}", "score": 1, "rater": f"{who}"} for n in (1, 2, 3) for who in range(n - 1)]
    said = [*liked, *({"response_id": f"r{n}", "edited": "e", "rater": "editor"} for n in (1, 2, 3))]
    rows = [request(n) for n in range(60)]
    _, train, held_out = prepared(of_rows(rows, [*said, *audited(range(10, 60))], eval_share=0.01, min_new_records=0))
    answers = {each.id: each.answer for each in (*train, *held_out)}
    assert [answers.get(f"r{n}") for n in (1, 2, 3)] == ["e", None, "own"]


def test_of_one_rater_the_last_word_counts_and_among_raters_more_than_half(of_rows) -> None:
    early, late = {"time": "2026-11-01T00:00:00Z"}, {"time": 1.8e18}  # ISO 8601, and nanoseconds
    said = [
        *rated([0], score=1, rater="a", **late), *rated([0], score=0, rater="a", **early),  # good: in any order
        *rated([1], edited="x", rater="a"), *rated([1], edited="y", rater="b"), *rated([1], edited="x", rater="c"),
        *rated([2], edited="x", rater="a"), *rated([2], edited="y", rater="b"),  # nobody knows
        *rated([3], score=0, rater="a"), *rated([3], score=0, rater="b"), *rated([3], outcome="x", rater=""),
        *audited(range(10, 60)),
    ]  # fmt: skip
    profile, train, held_out = prepared(of_rows([request(n) for n in range(60)], said))
    answers = {each.id: each.answer for each in (*train, *held_out)}
    assert [answers.get(f"r{number}") for number in range(4)] in (
        ["own", "x", None, "x"],
        [None, "x", None, "x"],  # its own words, beside what is held out
    )
    assert (profile["dropped"]["raters_disagree"], profile["logged"]["feedback"]["raters_differ"]) == (1, 2)


def test_a_record_whose_feedback_changed_is_new(of_rows, store: Store) -> None:
    def new(run_id: str, said: Sequence[Any]) -> int:
        config = of_rows([request(n) for n in range(60)], said, min_new_records=1)
        step = StepRun("prepare", run_id, config, store)
        if prepare_if_new(step):
            between_runs.advance_watermark(store, "icd", run_id)
        return int(step.result.get("new_records", 0))

    said = [*rated(range(20), edited="e"), *audited(range(20, 40))]
    assert new("first", said) == 40
    assert new("second", said) == 0
    assert new("third", [*said, *rated([7], edited="other", rater="a", time=2), *rated([50], score=1)]) == 1  # r7: tie
    more = [*rated([7], edited="other"), *rated([50], score=1), *rated([51, 52], label="own")]
    assert new("fourth", [*said, *more]) == 3


def test_feedback_on_what_is_in_no_log_yet_is_counted_and_joined_once_it_is(
    of_rows, write_rows: Write, store: Store
) -> None:
    def profile_of(run_id: str, config: RunConfig) -> tuple[dict[str, Any], int]:
        step = StepRun("prepare", run_id, config, store)
        published = prepare_if_new(step)
        between_runs.advance_watermark(store, "icd", run_id)
        return json.loads(store.get(f"{store.key(published.uri)}/profile.json")), int(step.result["new_records"])

    rows = [request(n) for n in range(60)]
    config = of_rows(rows[:40], rated(range(60), edited="e"), min_new_records=1)
    profile, new = profile_of("first", config)
    assert (profile["logged"]["feedback"]["unmatched"], new) == (20, 40)
    later = config.data.model_copy(update={"source": [config.data.source, write_rows(rows[40:], "later.jsonl")]})
    profile, new = profile_of("second", config.model_copy(update={"data": later}))
    assert (profile["logged"]["feedback"]["unmatched"], new) == (0, 20)
    shown = data_profile(profile)
    ((answers, number),) = dict(shown["counts"])["Logged answers"]
    assert (answers.startswith(f"by {VERSION}: 0.0 % of 60"), number) == (True, 60)


def test_one_rater_is_bounded_where_he_chose_and_each_of_his_answers_counts(of_rows) -> None:
    angry = [{**row, "rater": "angry"} for row in rated(range(60), edited="flipped")]
    labels = [{**row, "rater": "auditor"} for row in audited(range(60, 120))]
    config = of_rows([request(n) for n in range(120)], [*angry, *labels], max_rows_per_rater=10, whole_log=False)
    profile, train, held_out = prepared(config)
    assert len([each for each in train if each.answer == "flipped"]) <= 10
    assert profile["dropped"]["over_max_rows_per_rater"] == 50
    assert len([each for each in (*train, *held_out) if each.drawn == "audit"]) == 60
    judging = judges_of(held_out, config)
    assert judging.num_independent(100) == len(judging.records)
    assert f"one rater says what is right on {len(held_out)} of the" in str(profile["logged"]["warnings"])


def test_where_failures_outnumber_what_is_good_it_is_said(of_rows) -> None:
    rows = [request(n) for n in range(100)]
    said = [*rated(range(40), edited="e"), *audited(range(80, 100), label="own")]
    (warning,) = prepared(of_rows(rows, said))[0]["logged"]["warnings"]
    assert warning.startswith("40 of 60 answers to learn from put one right, while 40 of 100 drew no feedback")
    mostly_good = [*said, *rated(range(40, 80), score=1)]
    assert not prepared(of_rows(rows, mostly_good))[0]["logged"]["warnings"]


@pytest.mark.parametrize("who", ["user 7", "rater"])
def test_a_user_is_erased_from_what_comes_and_found_in_what_was(who: str, of_rows, store: Store) -> None:
    rows = [*(request(n) for n in range(60)), request(61, user="user 7", response=CUT)]
    said = [*rated(range(20), edited="e"), *audited(range(20, 50)), *rated([52], edited="his", rater="rater")]
    config = of_rows(rows, said)
    before = prepare(config, store)
    between_runs.erase(store, who, by="ada", hash_of=user_hash)
    with pytest.raises(DataError, match="1 record that was erased"):
        require_none_erased(store, before.uri)
    (holder,) = exposure_of(store, [], people={who: user_hash(who)}).datasets
    assert set(holder.ids) == ({"r7", "user 7"} if who == "user 7" else {"r52"})
    assert ("rejects" in holder.parts) == (who == "user 7")  # of the cut answer, the raw text
    after = prepare(config, store)
    require_none_erased(store, after.uri)
    records = [each for split in ("train", "eval") for each in load_split(store, after.uri, split)]
    assert not any(user_hash(who) in (each.user, each.rater) for each in records)
    assert not any("his" in each.answer for each in records) or who == "user 7"
    rejects = pq.read_table(pa.BufferReader(store.get(f"{store.key(after.uri)}/rejects.parquet")))
    assert ("user 7" in str(rejects.to_pylist())) == (who != "user 7")


@pytest.mark.parametrize(
    ("model", "version"),
    [
        *((name, VERSION) for name in (VERSION, f"org/model:{VERSION}", f"openai/icd@{VERSION}")),
        *((name, name) for name in ("claude-opus@20260301", "llama3:8b", "org/model")),
        *((name, "") for name in ("icd@production", "openai/icd", "icd@v12", "org/model:production", "production")),
    ],
)
def test_a_name_says_which_version_answered_or_is_refused(model: str, version: str, of_rows) -> None:
    rows = [request(n, model=model) for n in range(40)]
    config = of_rows(rows, rated(range(40), edited="e"))
    if version:
        assert {each.served_by for each in prepared(config)[1]} == {version}
    else:
        with pytest.raises(DataError, match=r"which does not say which version answered.*\n?"):
            prepared(config)


def test_an_outcome_under_the_customers_own_key_is_the_answer(of_rows) -> None:
    rows = [request(n, metadata={"case": f"C{n}"}) for n in range(40)]
    said = [{"case": f"C{n}", "outcome": n % 3, "time": "2026-11-30"} for n in range(40)]
    _, train, held_out = prepared(of_rows(rows, [*said, *rated([1], score=0)], feedback_key="case"))
    found = {(each.id, each.answer, each.origin) for each in (*train, *held_out)}
    assert found == {(f"r{n}", str(n % 3), "labelled") for n in range(40)}


def test_a_gateways_system_message_that_older_data_lack_is_named(of_rows) -> None:
    older = [{"prompt": f"older {n}", "completion": "a"} for n in range(40)]
    rows = [request(n) for n in range(40)]
    said = [*rated(range(20), edited="e"), *rated(range(20, 40), score=1)]
    (warning,) = prepared(of_rows([*older, *rows], said))[0]["logged"]["warnings"]
    assert "begin with another system message, 's', than the other records, ''" in warning
    same = [{"messages": [*ASKED, ANSWER | {"content": f"{n}"}]} for n in range(40)]
    assert not prepared(of_rows([*same, *rows], said))[0]["logged"]["warnings"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"response": CUT}, "the answer was cut: its finish_reason is length"),
        ({"response": CHUNK}, "the answer is a part of a stream: log it whole, once it has ended"),
        ({"status": "failure", "response": None}, "the request failed: it has no answer"),
        ({"response": {"error": "x"}}, "the response has no message"),
        ({"response": None, "output": [SAID, {"type": "function_call", "name": "f"}]}, "the response has no message"),
        ({"type": "SPAN"}, "a span is no answer of a model: export generations alone"),
    ],
)
def test_what_is_no_whole_answer_is_rejected_with_the_reason(changes: dict[str, Any], why: str, of_rows) -> None:
    rows = [*(request(n) for n in range(40)), request(40, **changes)]
    (rejected,) = prepared(of_rows(rows, rated(range(41), edited="e")))[0]["rejected"]
    assert str(rejected["reason"]).startswith(why)


def test_tool_calls_are_answers_and_earlier_answers_are_context(of_rows) -> None:
    turns = [[*ASKED, ANSWER, {"role": "user", "content": f"more of r{n}"}] for n in range(40)]
    rows = [request(n, request={"messages": turns[n], "tools": [CALL]}, response=CALLED) for n in range(40)]
    said = [*rated(range(20), score=1), *rated(range(20, 40), edited={"tool_calls": [CALL], "content": None})]
    _, train, held_out = prepared(of_rows(rows, said, loss_on="all"))
    assert {json.loads(each.calls)[0]["function"]["arguments"]["at"] for each in (*train, *held_out)} == {"x"}
    assert not any(turn.is_learned for each in train for turn in each.prompt if turn.role == "assistant")


def test_a_session_lies_on_one_side_though_it_crosses_a_promotion_and_raters(of_rows) -> None:
    rows = [request(n, session_id=f"s{n // 4}", model=(VERSION, OTHER)[n % 2], user=None) for n in range(200)]
    said = [{"response_id": f"r{n}", "edited": "e", "rater": f"rater {n % 37}"} for n in range(200)]
    profile, train, held_out = prepared(of_rows(rows, [*said, *audited(range(0, 200, 3))], whole_log=False))
    assert {each.served_by for each in train} == {VERSION, OTHER}
    assert held_out
    assert not {each.session for each in train} & {each.session for each in held_out}
    assert profile["dropped"]["own_words_or_session_beside_eval"] > 0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"score": 1}, "it names no answer"),
        ({"response_id": "r1"}, "it has no score"),
        ({"response_id": "r1", "score": 4}, r"beyond -1 to 1: set data\.feedback_good"),
        ({"response_id": "r1", "score": 1, "time": "yesterday"}, "its time is 'yesterday'"),
    ],
)
def test_feedback_that_says_nothing_stops_a_run(row: Any, why: str, of_rows) -> None:
    config = of_rows([request(n) for n in range(9)], [row], max_reject_share=0.05)
    with pytest.raises(DataError, match=rf"1 of 1 rows of data\.feedback are unusable.*\n.*{why}"):
        prepared(config)


def test_a_log_without_feedback_and_feedback_without_a_log_are_refused(of_rows) -> None:
    with pytest.raises(DataError, match=r"none of 9 logged answers is rated good.*data\.feedback"):
        prepared(of_rows([request(n) for n in range(9)]))
    rows = [{"prompt": f"{n}", "completion": "a"} for n in range(40)]
    with pytest.raises(DataError, match="no row of data"):
        prepared(of_rows(rows, rated(range(9), score=1)))


@pytest.mark.parametrize(
    ("said", "is_good"),
    [
        ({"gen_ai.response.id": "r1", "gen_ai.evaluation.score.value": 1.0}, True),
        ({"gen_ai.response.id": "r1", "gen_ai.evaluation.score.label": "not_relevant"}, False),
        ({"observation_id": "r1", "value": 0, "string_value": "False", "data_type": "BOOLEAN"}, False),
        ({"attributes": {"gen_ai.response.id": "r1", "gen_ai.evaluation.score.label": "pass"}}, True),
        ({"response_id": "r1", "score": "true"}, True),
        ({"response_id": "r1", "score": -1}, False),
    ],
)
def test_ratings_as_others_write_them(said: dict[str, Any], is_good: bool) -> None:
    vote = feedback.vote_of(said, key="", least=None)
    assert (vote.key, vote.kind, vote.value) == (("", "r1"), "rating", is_good)
    assert feedback.vote_of({"response_id": "r1", "score": 4}, key="", least=4).value


# Ten thousand turns of users, raters and versions, whose truth the generator keeps.


@pytest.mark.slow
def test_ten_thousand_logged_turns(store: Store, of_rows: Callable[..., RunConfig]) -> None:
    made = logged.generated(10_000, seed=1)
    drawn = draw([*made.truth], 1_500)
    for name in drawn:
        truth = made.truth[name]
        truth.answer, truth.origin, truth.is_used = f"right words of {name}", "labelled", True
    audit = [{"response_id": name, "label": made.truth[name].answer, "audit": name_of_draw(drawn)} for name in drawn]
    config = of_rows(made.rows, [*made.feedback, *audit], eval_share=0.2, max_rows_per_rater=50)
    first = prepare(config, store)
    train, held_out = (load_split(store, first.uri, split) for split in ("train", "eval"))
    assert len(train) > 500
    assert len(held_out) > 100
    for record in (*train, *held_out):
        truth = made.truth[record.id]
        assert (record.answer, record.origin, record.served_by) == (truth.answer, truth.origin, truth.served_by)
        assert (record.session, record.user) == (truth.session, user_hash(truth.user))
    assert {each.id for each in held_out} <= {*drawn}
    assert not {each.session for each in train} & {each.session for each in held_out}
    assert {each.id for each in (*train, *held_out)} <= {name for name, truth in made.truth.items() if truth.is_used}
    gone = max({truth.user for truth in made.truth.values()}, key=lambda user: len(made.of_user(user)))
    between_runs.erase(store, gone, by="ada", hash_of=user_hash)
    after = prepare(config, store)
    left = [each for split in ("train", "eval") for each in load_split(store, after.uri, split)]
    assert {each.id for each in (*train, *held_out)} & made.of_user(gone)
    assert not {each.id for each in left} & made.of_user(gone)
