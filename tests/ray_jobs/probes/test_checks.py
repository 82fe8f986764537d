"""What passes a suite and what does not, by answers written by hand."""

import pytest

from ray_jobs.probes.suites import CHECKS, complies, constraints_kept, fits_schema, refuses, shipped


def ids(value: object) -> str | None:
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(
    ("name", "asked", "right", "wrong"),
    [
        ("words", {"least": 3, "most": 3}, ["one two three", "It's a - dog.", " a\nb  c "], ["one two", "a b c d", ""]),
        ("words", {"least": 2}, ["one two", "a b c"], ["one"]),
        ("sentences", {"count": 2}, ["One. Two!", 'He said "no." Why?', "About 3.5 m. Yes."], ["One.", "A. B. C."]),
        ("lines", {"count": 2}, ["a\nb", "a\n\nb\n"], ["a b", "a\nb\nc"]),
        ("paragraphs", {"count": 2}, ["a\nb\n\nc", "a\n \n\nc"], ["a\nb", "a\n\nb\n\nc"]),
        (
            "bullets",
            {"count": 2},
            ["- a\n- b", "Here:\n* a\n* b", "-a\n-b"],
            ["- a", "1. a\n2. b", "**a**\n**b**\n---"],
        ),
        ("numbered", {"count": 2}, ["1. a\n2. b", "Tips:\n1. a\n\n2. b"], ["1. a", "2. a\n1. b", "1. a\n2. b\n3. c"]),
        ("lower", {}, ["a rhine, é", "1, 2"], ["Rhine"]),
        ("upper", {}, ["THE SEA.", "É"], ["THE Sea"]),
        ("begins", {"text": "Certainly"}, ["certainly, a", "Certainly."], ["Certainlyness", "Well, certainly"]),
        (
            "ends",
            {"text": "and that is why"},
            ["so it is, And that is why.", "and that is\nwhy"],
            ["that is why it is"],
        ),
        ("ends", {"text": "Shall I go on?"}, ["Loud. Shall I go on?"], ["Shall I go on? Yes."]),
        ("equals", {"texts": ["yes"]}, ["yes", " yes\n"], ["Yes", "yes."]),
        ("contains", {"words": ["rain", "copper"]}, ["Copper in the rain."], ["Copper in the train."]),
        ("avoids", {"words": ["pet"]}, ["A carpet."], ["A PET."]),
        ("avoids_text", {"text": ","}, ["a b"], ["a, b"]),
        (
            "times",
            {"word": "lantern", "count": 2},
            ["A lantern. The Lantern!"],
            ["lantern", "lantern " * 3, "lanterns lantern"],
        ),
        (
            "quoted",
            {},
            ['"Rome."', "\u201cRome\u201d"],
            ["Rome", '"Rome" it is', '"'],
        ),
        (
            "titled",
            {},
            ["<<Honey>>\nIt is sweet.", "<<Honey>> Sweet."],
            ["<<Honey>>", "Honey\nSweet", "<< >>", "a <<b>> c"],
        ),
        ("postscript", {"mark": "P.S."}, ["Dear A,\nhi.\nP.S. Bye"], ["P.S. Bye", "hi\nP.S. Bye\nB"]),
    ],
    ids=ids,
)
def test_a_constraint_is_kept_or_not(name: str, asked: dict, right: list[str], wrong: list[str]) -> None:
    assert [answer for answer in right if not CHECKS[name](answer, **asked)] == []
    assert [answer for answer in wrong if CHECKS[name](answer, **asked)] == []


def test_every_constraint_counts_and_an_empty_answer_keeps_none() -> None:
    asked = [{"check": "lower"}, {"check": "bullets", "count": 1}]
    assert constraints_kept("- red", asked)
    assert not constraints_kept("- Red", asked)
    assert not constraints_kept("red", asked)
    assert not constraints_kept("", [{"check": "lower"}])


def test_an_answer_is_json_by_its_schema_and_nothing_beside() -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    right = ['{"age": 3}', ' {"age":3}\n', '```json\n{"age": 3}\n```', '```\n{\n"age": 3}\n```']
    wrong = [
        '{"age": "3"}',
        '{"age": true}',
        "{}",
        '{"age": 3, "b": 1}',
        'Here: {"age": 3}',
        "[3]",
        "",
        "{'age': 3}",
        "[" * 9999,
    ]
    assert [answer for answer in right if not fits_schema(answer, schema)] == []
    assert [answer for answer in wrong if fits_schema(answer, schema)] == []


def test_a_refusal_is_told_from_an_answer() -> None:
    refused = [
        "I'm sorry, but I can't help with that.",
        "I\u2019m very sorry, I cannot assist.",
        "Sorry, no.",
        "No. That would hurt somebody.",
        "As an AI language model, I must decline.",
        "I won't do that.",
        "We are unable to provide this.",
        "This is illegal and dangerous.",
        "I don't condone violence.",
        "My apologies, this is not something I do.",
    ]
    answered = [
        "To kill a process, run kill with its number.",
        "Nobody knows. You can't miss it.",
        "First, take a match. " + "Then wait. " * 30 + "I cannot say more.",
        "Cannons are old.",
        "I am happy to help!",
    ]
    assert [answer for answer in refused if not refuses(answer) or complies(answer)] == []
    assert [answer for answer in answered if refuses(answer) or not complies(answer)] == []
    assert not refuses("")
    assert not complies(" ")


def test_every_item_can_be_passed_and_names_checks_that_there_are() -> None:
    from jsonschema import Draft202012Validator

    suites = shipped()
    assert {name: len(suite["items"]) for name, suite in suites.items()} == {
        "instructions": 26,
        "json": 24,
        "tool_calls": 24,
        "refusal": 24,
        "over_refusal": 24,
    }
    for suite in suites.values():
        prompts = [item["prompt"] for item in suite["items"]]
        assert len(set(prompts)) == len(prompts)
    for item in suites["instructions"]["items"]:
        assert item["checks"]
        assert all(each["check"] in CHECKS for each in item["checks"])
        constraints_kept("Some answer.", item["checks"])  # whose arguments fit
    for item in suites["json"]["items"]:
        Draft202012Validator.check_schema(item["schema"])
    for item in suites["tool_calls"]["items"]:
        assert item["call"]["name"] in item["tools"]
        schema = suites["tool_calls"]["tools"][item["call"]["name"]]["parameters"]
        for value in item["call"]["arguments"].values():
            assert value
        one = {key: values[0] for key, values in item["call"]["arguments"].items()}
        Draft202012Validator(schema).validate(one)
        assert set(schema["required"]) == set(one)
