import pytest

from components.prepare.dataset import Message
from components.prepare.validate import canonical_prompt, validate
from components.shared.errors import DataError

USER = {"role": "user", "content": "Which chapter?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Eye"}


def test_prompt_and_completion_become_one_user_message_and_the_answer() -> None:
    record = validate({"prompt": "Which chapter?", "completion": "Eye"}).record
    assert record.prompt == [Message("user", "Which chapter?")]
    assert record.answer == "Eye"


def test_the_last_assistant_message_is_the_answer_and_the_turns_before_it_the_prompt() -> None:
    earlier = {"role": "assistant", "content": "Skin"}
    record = validate({"messages": [SYSTEM, USER, earlier, USER, ANSWER]}).record
    assert [turn.role for turn in record.prompt] == ["system", "user", "assistant", "user"]
    assert record.prompt[0].content == "Be brief."
    assert record.answer == "Eye"


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


def test_leading_whitespace_is_kept() -> None:
    assert validate({"prompt": "q", "completion": "  indented"}).record.answer == "  indented"


def test_an_integer_id_and_its_text_name_the_same_record() -> None:
    number = validate({"id": 7, "prompt": "a", "completion": "b"})
    text = validate({"id": "7", "prompt": "c", "completion": "d"})
    assert number.key == text.key
    assert number.record.id == text.record.id == "7"


def test_a_record_without_id_is_keyed_by_its_prompt_alone() -> None:
    one = validate({"prompt": "a", "completion": "b"})
    other = validate({"prompt": "a", "completion": "c"})
    assert one.key == other.key
    assert one.record.id != other.record.id


def test_an_id_never_collides_with_a_prompt() -> None:
    prompt = canonical_prompt([Message("user", "a")])
    named = validate({"id": prompt, "prompt": "x", "completion": "y"})
    assert named.key != validate({"prompt": "a", "completion": "y"}).key


def test_prompts_that_only_look_alike_when_joined_differ() -> None:
    one_turn = [Message("user", "a1:user:b")]
    two_turns = [Message("user", "a"), Message("user", "b")]
    assert canonical_prompt(one_turn) != canonical_prompt(two_turns)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "row is a list: expected an object with prompt and completion, or messages"),
        ("text", "row is text: expected an object"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": " \n\t", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a"}, "completion is missing"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"completion": "b"}, "prompt is missing"),
        ({"prompt": "a", "completion": 3}, "completion is a number: expected text"),
        ({"prompt": b"a", "completion": "b"}, "prompt is bytes: expected text"),
        ({"prompt": True, "completion": "b"}, "prompt is true or false: expected text"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": "hello"}, "messages is text: expected a list of {role, content}"),
        ({"messages": ["hello"]}, "messages[0] is text: expected {role, content}"),
        (
            {"messages": [USER, ANSWER, {"role": "tool", "content": "x"}]},
            "messages[2].role is 'tool': expected system, user or assistant",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing: expected system, user or assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role is a list: expected system"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is missing"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content is a list: expected text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[1] has tool_calls: only text is supported",
        ),
        ({"messages": [USER]}, "the last message is from 'user': expected assistant"),
        ({"messages": [ANSWER]}, "messages has no user message before the answer"),
        ({"messages": [SYSTEM, ANSWER]}, "messages has no user message before the answer"),
        ({"prompt": [SYSTEM], "completion": "b"}, "prompt has no user message before the answer"),
        ({"prompt": "a", "completion": [ANSWER, ANSWER]}, "completion has messages from assistant, assistant"),
        ({"prompt": "a", "completion": [USER]}, "completion has messages from user: expected one, from assistant"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, "row has messages and also prompt or completion"),
        ({"id": 1.5, "prompt": "a", "completion": "b"}, "id is a number: expected text or a whole number"),
        ({"id": True, "prompt": "a", "completion": "b"}, "id is true or false"),
        ({"id": "", "prompt": "a", "completion": "b"}, "id is empty"),
        ({"prompt": "a\ud800", "completion": "b"}, "text is not valid Unicode: lone surrogate '\\ud800'"),
        ({"id": "\udfff", "prompt": "a", "completion": "b"}, "text is not valid Unicode: lone surrogate '\\udfff'"),
    ],
)
def test_an_unusable_row_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(DataError) as refusal:
        validate(row)
    assert str(refusal.value).startswith(reason)
