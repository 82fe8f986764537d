import json
from typing import Any

import pytest

from components.prepare.dataset import Message
from components.prepare.validate import MAX_NAME_CHARS, MAX_TEXT_CHARS, canonical_prompt, unread_keys
from components.shared.errors import DataError
from tests.doubles import datasets
from tests.doubles.datasets import validate

USER = {"role": "user", "content": "Which chapter?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Eye"}


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


def test_the_last_assistant_message_is_the_answer_and_the_turns_before_it_the_prompt() -> None:
    earlier = {"role": "assistant", "content": "Skin"}
    record = validate({"messages": [SYSTEM, USER, earlier, USER, ANSWER]}).record
    assert [turn.role for turn in record.prompt] == ["system", "user", "assistant", "user"]
    assert record.prompt[0].content == "Be brief."
    assert record.answer == "Eye"


BAD = {"role": "assistant", "content": "Skin", "weight": 0}


def test_a_turn_of_weight_0_stays_context_of_the_same_prompt_and_makes_another_content() -> None:
    turns = ([USER, {**BAD, "weight": weight}, USER, {**ANSWER, "weight": 1}] for weight in (None, 0.0, 1))
    plain, marked, learned = (validate({"messages": messages}) for messages in turns)
    assert learned == plain
    assert [turn.is_learned for turn in marked.record.prompt] == [True, False, True]
    assert [turn.more for turn in marked.record.prompt] == ["", '{"weight":0}', ""]
    assert (marked.key, marked.place, marked.turns) == (plain.key, plain.place, plain.turns)
    assert marked.content != plain.content
    called = validate({"messages": [USER, {**ASKS, "weight": 0}, RESULT, ANSWER]})
    assert called.turns == validate({"messages": [USER, ASKS, RESULT, ANSWER]}).turns


def test_a_row_ends_with_its_last_answer_that_is_learned_if_all_are_and_is_refused_otherwise() -> None:
    row = {"messages": [USER, ANSWER, USER, BAD]}
    assert validate(row, loss_on="all") == validate({"messages": [USER, ANSWER]})
    with pytest.raises(DataError, match=r"the answer has weight 0.*data.loss_on=all learns from the earlier ones"):
        validate(row)
    for alone in ({"messages": [USER, BAD]}, {"prompt": "Which chapter?", "completion": [BAD]}):
        for loss_on in ("last", "all"):
            with pytest.raises(DataError, match=r"nothing of the row would be learned$"):
                validate(alone, loss_on=loss_on)


def test_the_developer_is_the_system() -> None:
    developer, system = ({"messages": [{**SYSTEM, "role": role}, USER, ANSWER]} for role in ("developer", "system"))
    assert validate(developer) == validate(system)


def test_keys_of_messages_that_nothing_is_read_from_are_named() -> None:
    asks = {**ASKS, "reasoning_content": "hm", "weight": 1}
    ended = {**ANSWER, "audio": {}, "function_call": None, "id": 0}
    turns = [{**USER, "name": "Ann", "refusal": None}, asks, RESULT, ended]
    unread = {"messages[].name", "messages[].reasoning_content", "messages[].id"}
    assert unread_keys({"messages": turns}) == unread_keys({"messages": json.dumps(turns)}) == unread
    assert unread_keys({"prompt": turns[:1], "completion": "a"}) == {"prompt[].name"}
    assert not unread_keys({"messages": "[{", "prompt": "q", "completion": ["a", None]})


def test_all_forms_of_the_same_example_are_the_same_record() -> None:
    forms = [
        {"prompt": "Which chapter?", "completion": "Eye"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "prompt": None, "completion": None, "id": None},
        {"prompt": "Which chapter? \n", "completion": "Eye\n", "source": "an extra column"},
    ]
    first, *others = [validate(form) for form in forms]
    assert all(other == first for other in others)


def test_text_is_composed_to_nfc() -> None:
    decomposed = validate({"prompt": "Cafe\u0301", "completion": "a\u0308"})
    composed = validate({"prompt": "Caf\u00e9", "completion": "\u00e4"})
    assert decomposed == composed
    assert composed.record.answer == "\u00e4"
    assert validate({"prompt": "q", "completion": "  indented"}).record.answer == "  indented"


def test_an_integer_id_and_its_text_name_the_same_record() -> None:
    number = validate({"id": 7, "prompt": "a", "completion": "b"})
    text = validate({"id": "7", "prompt": "c", "completion": "d"})
    assert number.key == text.key
    assert number.record.id == text.record.id == "7"


def test_an_id_never_collides_with_a_prompt() -> None:
    prompt = canonical_prompt([Message("user", "a")])
    named = validate({"id": prompt, "prompt": "x", "completion": "y"})
    assert named.key != validate({"prompt": "a", "completion": "y"}).key


def test_prompts_that_only_look_alike_when_joined_differ() -> None:
    one_turn = [Message("user", "a1:user:b")]
    two_turns = [Message("user", "a"), Message("user", "b")]
    assert canonical_prompt(one_turn) != canonical_prompt(two_turns)


def calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "x", "tool_calls": [call]}


CALLS, ARGUMENTS = calling({"function": {"name": "f"}}), "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "row is a list: expected an object with prompt and completion, or messages"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": " \n\t", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"prompt": "a", "completion": 3}, "completion is a number: expected text"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5: expected 0, which is not lear"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["hello"]}, "messages[0] is text: expected {role, content}"),
        ({"messages": [USER, ANSWER, {"role": "tool", "content": "x"}]}, "the last message is from 'tool'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing: expected system, user, assistant or tool"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is missing"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]},
            "messages[0].content[0] is of type 'image",
        ),
        ({"messages": [USER, calling({"id": "1"})]}, "messages[1].tool_calls[0] names no function"),
        ({"messages": [USER, calling({"function": {"name": "f", "arguments": "["}})]}, f"{ARGUMENTS} is text that is"),
        ({"messages": [USER, calling({"function": {"name": "f", "arguments": [1]}})]}, f"{ARGUMENTS} is a list"),
        ({"messages": [{**CALLS, "role": "user"}, ANSWER]}, "messages[0] has tool_calls and is from user"),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]}, "messages[1] has function_call"),
        ({"prompt": "a", "completion": "b", "tools": "none"}, "tools is text that is not JSON"),
        ({"prompt": "a", "completion": "b", "tools": {"name": "f"}}, "tools is an object: expected a list"),
        ({"prompt": "a", "completion": "b", "tools": [{"type": "function"}]}, "tools[0] names no function"),
        ({"messages": [SYSTEM, ANSWER]}, "messages has no user message before the answer"),
        ({"prompt": [SYSTEM], "completion": "b"}, "prompt has no user message before the answer"),
        ({"prompt": "a", "completion": [USER]}, "completion has other messages than one from assistant"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, "row has messages and also prompt or completion"),
        ({"id": 1.5, "prompt": "a", "completion": "b"}, "id is a number: expected text or a whole number"),
        ({"prompt": "a\ud800", "completion": "b"}, "text is not valid Unicode: lone surrogate '\\ud800'"),
        # What would take all time or memory.
        ({"prompt": "a", "completion": "x" * (MAX_TEXT_CHARS + 1)}, "completion has 16777217 characters: expected at"),
        ({"id": "i" * (MAX_NAME_CHARS + 1), "prompt": "a", "completion": "b"}, "id has 4097 characters: expected at"),
        ({"prompt": "a", "completion": "b", "tools": "[" * 200_000}, "tools is text that is not JSON"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f", "x": nested(100_000)}]}, "tools and their calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unusable_row_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(DataError) as refusal:
        validate(row)
    assert str(refusal.value).startswith(reason)


# A conversation as OpenAI's API records it: arguments are JSON text there, an object for chat templates.
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call12345", "content": "rain"}


def test_tools_their_calls_and_results_are_kept() -> None:
    record = validate({"messages": [USER, ASKS, RESULT, ANSWER], "tools": [WEATHER]}).record
    assert json.loads(record.tools) == [WEATHER]
    _, asks, result = record.prompt
    called = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert (asks.content, json.loads(asks.more)) == ("", {"tool_calls": [called]})
    assert (result.role, result.content, json.loads(result.more)) == ("tool", "rain", {"tool_call_id": "call12345"})
    assert (record.answer, record.calls) == ("Eye", "")
    ended = validate({"messages": [USER, ASKS], "tools": json.dumps([WEATHER])}).record  # as Parquet holds them
    assert (ended.answer, json.loads(ended.calls), ended.tools) == ("", [called], record.tools)


def test_records_differ_by_their_tools_and_calls() -> None:
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "tools": [WEATHER]},
        {"messages": [USER, ASKS]},
        {"messages": [USER, {**ASKS, "content": "Eye"}]},
        {"messages": [USER, ASKS, RESULT, ANSWER]},
        {"messages": [USER, ASKS, {**RESULT, "tool_call_id": "another"}, ANSWER]},
    ]
    found = [validate(row) for row in rows]
    assert len({each.content for each in found}) == len(rows)
    assert len({datasets.dataset_id([each.record], []) for each in found}) == len(rows)


def test_content_in_parts_is_the_text_of_all_of_them() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}]
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "three"}]}
    record = validate({"messages": [{"role": "user", "content": parts}, answer]}).record
    assert record.prompt[0].content == "one\ntwo"
    assert record.answer == "three"
    as_text = json.dumps([{"role": "user", "content": parts}, answer])
    assert validate({"messages": as_text}).record == record
