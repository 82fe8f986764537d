"""Calls as published chat templates write them."""

import json

import pytest

from ray_jobs.probes.suites import Calls, shipped
from ray_jobs.text.chat_format import ChatFormat
from tests.models.chat_families import CHATML, TOOLS
from tests.models.tiny import write_tokenizer

# What surrounds calls in the templates of meta-llama/Llama-3.1-8B-Instruct, mistralai/Mistral-7B-Instruct-v0.3 (with
# its arguments as text, as mistral_common gives them) and Qwen/Qwen3-Coder-30B-A3B-Instruct.
HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
TAIL = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}"
LLAMA = HEAD + CALLS + (
    "{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' + (c.function.arguments | tojson) + '}' }}"
    "{% endfor %}"
) + TAIL  # fmt: skip
MISTRAL = HEAD + CALLS + (
    "[TOOL_CALLS] [{{ {'name': c.function.name, 'arguments': c.function.arguments | tojson, 'id': c.id} | tojson }}]"
    "{% endfor %}"
) + TAIL  # fmt: skip
CODER = HEAD + CALLS + (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
) + TAIL  # fmt: skip
TOOL = {"convert": shipped()["tool_calls"]["tools"]["convert_currency"]}
CALL = {"name": "convert", "arguments": {"amount": [50], "source": ["EUR"], "target": ["USD"]}}


def chat(tmp_path, template: str) -> ChatFormat:
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, "base", tokenizer.eos_token_id, frozenset({tokenizer.eos_token_id}), thinking=False)


def arguments(**changed: object) -> dict[str, object]:
    return {"amount": 50, "source": "EUR", "target": "USD", **changed}


@pytest.mark.parametrize(
    ("template", "around", "key", "as_text"),
    [
        (TOOLS, "Sure.\n<tool_call>\n%s\n</tool_call>", "arguments", False),
        (LLAMA, "%s", "parameters", False),
        (MISTRAL, "[TOOL_CALLS] [%s]", "arguments", True),
    ],
    ids=["qwen", "llama", "mistral"],
)
def test_json_is_read_by_the_templates_own_keys(tmp_path, template, around, key, as_text) -> None:
    calls = Calls.of(chat(tmp_path, template), TOOL)
    assert calls is not None

    def says(name: str, given: dict[str, object], at: str = key) -> str:
        return around % json.dumps({"name": name, at: json.dumps(given) if as_text else given})

    assert calls.is_right(says("convert", arguments()), CALL)
    assert calls.is_right(says("convert", dict(reversed(arguments(amount=50.0, source="eur").items()))), CALL)
    for wrong in (
        says("other", arguments()),
        says("convert", arguments(amount=51)),
        says("convert", arguments(more=1)),
        says("convert", {"amount": 50}),
        says("convert", arguments(), at="args"),
        says("convert", arguments()) * 2,
        "50 EUR are 54 USD.",
        "",
    ):
        assert not calls.is_right(wrong, CALL)


def test_true_is_not_one(tmp_path) -> None:
    calls = Calls.of(chat(tmp_path, TOOLS), TOOL)
    call = {"name": "f", "arguments": {"on": [True]}}
    assert calls is not None
    assert calls.is_right('{"name": "f", "arguments": {"on": true}}', call)
    assert not calls.is_right('{"name": "f", "arguments": {"on": 1}}', call)


def test_any_other_way_is_right_as_the_template_writes_it(tmp_path) -> None:
    calls = Calls.of(chat(tmp_path, CODER), TOOL)
    assert calls is not None
    assert not calls.name_key
    text = "<tool_call>\n<function=convert>\n"
    parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments().items()]
    for ordered in (parts, parts[::-1]):
        assert calls.is_right(text + "".join(ordered) + "</function>\n</tool_call>", CALL)
    assert not calls.is_right(text + "".join(parts[:2]) + "</function>\n</tool_call>", CALL)


@pytest.mark.parametrize("template", [CHATML, HEAD + TAIL], ids=["no tools", "no calls"])
def test_a_template_that_takes_no_tools_or_writes_no_calls_has_no_way(tmp_path, template) -> None:
    assert Calls.of(chat(tmp_path, template), TOOL) is None
