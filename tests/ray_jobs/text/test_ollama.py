"""Templates for Ollama; the judges are Jinja, which writes what models are trained on, and Go's own text/template."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from ray_jobs.text import ollama
from tests.models.tiny import TEMPLATE

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    '"helpful" {{ "{{" }}AI{{ "}}" }}.<|im_end|>\n{% endif %}<|im_start|>{{ message[\'role\'] }}\n'
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message within the first user's turn, as Llama 2 has it.
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<s>[INST] {% if loop.first %}{{ system }}{% endif %}{{ message['content'] }} "
    "[/INST]{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}<bos>"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NUMBERED = "{% for message in messages %}{{ loop.index }}. {{ message['content'] }}\n{% endfor %}"
WORKING = {"chatml": CHATML, "inst": INST, "gemma": NO_SYSTEM, "tiny": TEMPLATE}
PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var given struct { Template string; Conversations [][]Message }
    if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
    for _, messages := range given.Conversations {
        if err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""
TALKS = [
    [("user", "Mpox?")],
    [("user", "a"), ("assistant", "b"), ("user", "  c\n{{ d }}")],
    [(("user", "assistant")[place % 2], letter) for place, letter in enumerate("abcdefg")],
    [("system", 'Say "hi".'), ("user", "Mpox?")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def prompts(template: str) -> Any:
    """What the template makes of turns; nothing where it refuses them."""
    compiled = jinja2.Environment(keep_trailing_newline=True).from_string(template)

    def prompt(turns: Sequence[Mapping[str, str]]) -> str:
        try:
            return compiled.render(messages=turns, add_generation_prompt=True, raise_exception=refuse)
        except jinja2.TemplateError:
            return ""

    return prompt


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    subprocess.run(["go", "build", "-o", "run", "main.go"], cwd=folder, env=environment, check=True)
    return folder / "run"


@pytest.mark.slow  # compiles Go's text/template
@pytest.mark.parametrize("name", WORKING)
def test_go_writes_what_the_models_own_template_writes(name: str, go_program: Path) -> None:
    prompt = prompts(WORKING[name])
    joints = ollama.joints(prompt, "")
    talks = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
    expected = [prompt(talk) for talk in talks]
    known = [talk for talk, text in zip(talks, expected, strict=True) if text]
    assert len(known) == (3 if name == "gemma" else 5)
    given = {"Template": ollama.go_template(joints), "Conversations": known}
    said = subprocess.run([go_program], input=json.dumps(given).encode(), capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == [text for text in expected if text]


def test_a_template_that_tells_turns_by_more_than_their_role_is_not_rewritten() -> None:
    assert ollama.joints(prompts(NUMBERED), "") is None
    assert ollama.joints(lambda turns: "", "") is None


def test_the_beginning_of_the_sequence_is_left_to_whoever_puts_it_there() -> None:
    with_it, without = (ollama.joints(prompts(NO_SYSTEM), bos) for bos in ("", "<bos>"))
    assert with_it["", "user"] == "<bos><start_of_turn>user\n"
    assert without["", "user"] == "<start_of_turn>user\n"
    assert ("", "system") not in with_it
