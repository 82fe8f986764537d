"""How conversations read to a base, and where its answers end."""

import dataclasses
import hashlib
import json
import shutil

import pytest
from transformers import AutoTokenizer

from components.prepare.dataset import Message, Record
from components.shared.errors import ConfigError, DataError, IntegrityError
from ray_jobs.text import chat_format
from tests.models import chat_families
from tests.models.chat_families import CHATML, FAMILIES, chat_of

# As Mistral's and Llama-2's templates count turns.
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_a_base_without_padding_pads_with_the_end(tiny_base, tmp_path):
    bare = shutil.copytree(tiny_base, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = chat_of(bare)
    assert chat.tokenizer.convert_ids_to_tokens(chat.pad) == "<|end|>"
    del settings["eos_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="its tokenizer has no end-of-sequence token"):
        chat_of(bare)


@pytest.mark.parametrize(
    ("name", "end_of_turn", "others"),
    [
        ("chatml", "<|im_end|>", set()),
        ("chatml on a base's tokenizer", "<|im_end|>", {"<|endoftext|>"}),
        ("llama-3", "<|eot_id|>", {"<|end_of_text|>", "<|eom_id|>"}),
        ("gemma", "<end_of_turn>", {"<eos>"}),
        ("phi-3", "<|end|>", {"<|endoftext|>", "<|assistant|>"}),
        ("mistral", "</s>", set()),
        ("none", "</s>", set()),
    ],
)
def test_an_answer_ends_where_tokenizer_base_or_template_ends_it(tmp_path, name, end_of_turn, others):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES[name]))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == end_of_turn
    assert set(chat.tokenizer.convert_ids_to_tokens(list(chat.stops))) == {end_of_turn, *others}


def test_without_a_generation_config_the_models_own_end_is_a_stop_too(tmp_path):
    folder = chat_families.build(tmp_path, FAMILIES["llama-3"])
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    chat = chat_of(folder)
    end_of_text = chat.tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert end_of_text not in chat.stops
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end_of_text}))
    assert end_of_text in chat_of(folder).stops


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_earlier_answers_lose_their_reasoning_too_unless_the_model_is_asked_to_think(tiny_base, tmp_path, loss_on):
    """By a template that writes every turn as it is."""
    turns = [Message("user", "sky"), Message("assistant", "<think>\nthe sky\n</think>\n\nblue"), Message("user", "sea")]
    record = Record("r", turns, "<think>\nthe sea\n</think>\n\ngreen")
    as_it_is = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    said = "".join(with_template(tiny_base, tmp_path / "plain", as_it_is).rows(record, loss_on)[0])
    assert said == "[user]sky[assistant]blue[user]sea[assistant]green"
    thinking = with_template(tiny_base, tmp_path / "thinking", as_it_is, thinking=True)
    assert "the sky" in "".join(thinking.rows(record, loss_on)[0])


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3-thinking"])
@pytest.mark.parametrize("said", ["blue", "<think>\nthe sky\n</think>\n\nblue"])
def test_a_block_of_reasoning_is_closed_before_the_answer_begins(tmp_path, name, said):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES[name]))
    [[prompt, answer]] = chat.rows(Record("r", [Message("user", "sky")], said))
    # What https://huggingface.co/Qwen/Qwen3-8B renders with enable_thinking=False.
    assert prompt == "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert answer.removesuffix("<|im_end|>\n") == "blue"


@pytest.mark.parametrize(
    ("name", "prompt_ends", "answer"),
    [
        ("qwen-3", "assistant\n", "<think>\nthe sky\n</think>\n\nblue<|im_end|>\n"),
        ("qwen-3-thinking", "assistant\n<think>\n", "the sky\n</think>\n\nblue<|im_end|>\n"),
    ],
)
def test_who_asks_for_reasoning_trains_on_it(tmp_path, name, prompt_ends, answer):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES[name]), thinking=True)
    said = Record("r", [Message("user", "sky")], "<think>\nthe sky\n</think>\n\nblue")
    [[prompt, found]] = chat.rows(said)
    assert prompt.endswith(prompt_ends)
    assert found == answer


def test_reasoning_without_an_answer_is_no_answer(tmp_path):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES["qwen-3"]))
    with pytest.raises(DataError, match=r"record 'r7' answers with a block of reasoning .* model\.thinking=true"):
        chat.rows(Record("r7", [Message("user", "sky")], "<think>\nthe sky\n</think>\n"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("blue", "blue"),
        ("<think>\nhm\n</think>\n\nblue", "blue"),
        ("hm\n</think>\n\nblue", "blue"),
        ("<think>\nhm, and then it ran out of", ""),
        ("a <think> in the middle", "a <think> in the middle"),
    ],
)
def test_what_follows_a_block_of_reasoning_is_the_answer(text, answer):
    assert chat_format.without_reasoning(text) == answer


def test_the_plain_template_begins_as_the_tokenizer_begins_a_text(tmp_path):
    chat = chat_of(chat_families.build(tmp_path / "with", FAMILIES["none"]))
    [[prompt, _]] = chat.rows(Record("r", [Message("user", "sky")], "blue"))
    assert prompt == "<s>sky\n\n"
    # As a server reads a bare text: by the tokenizer, with the special tokens that it adds.
    read = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert read == chat.tokenizer("sky\n\n")["input_ids"]
    bare = chat_of(chat_families.build(tmp_path / "without", FAMILIES["none, without a beginning"]))
    [[prompt, _]] = bare.rows(Record("r", [Message("user", "sky")], "blue"))
    assert bare.tokenizer(prompt, add_special_tokens=False) == bare.tokenizer("sky\n\n")


def test_the_lineage_says_whose_template_it_was(tmp_path):
    own = chat_of(chat_families.build(tmp_path / "own", FAMILIES["gemma"])).recipe()
    assert own == {
        "template_from": "base",
        "template_sha256": hashlib.sha256(FAMILIES["gemma"].template.encode()).hexdigest(),
        "template_kwargs": {},
        "stops": ["<eos>", "<end_of_turn>"],
    }
    plain = chat_of(chat_families.build(tmp_path / "plain", FAMILIES["none"])).recipe()
    assert plain["template_from"] == "fineloop"


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_asked_in_the_words_of_its_base_and_with_others_in_its_files_not_at_all(tmp_path, name):
    folder, version = chat_families.build(tmp_path / "base", FAMILIES[name]), tmp_path / "version"
    chat_of(folder).tokenizer.save_pretrained(version)
    (version / "tokenizer.json").write_text("not even a tokenizer")
    assert chat_of(folder, version=version).recipe() == chat_of(folder).recipe()
    assert chat_of(folder, version=tmp_path / "elsewhere").recipe() == chat_of(folder).recipe()
    # It would never end: nobody renders it.
    (version / "chat_template.jinja").write_text(
        "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"
    )
    whose = r"s3://registry/colours/v1 hold a chat template with sha256 \w+, and that of its base base .* has \w+"
    with pytest.raises(IntegrityError, match=whose):
        chat_of(folder, version=version)


def test_a_template_that_another_system_saved_with_its_own_line_ends_is_the_same(tmp_path):
    folder, version = chat_families.build(tmp_path / "base", FAMILIES["chatml"]), tmp_path / "version"
    template = chat_of(folder).tokenizer.chat_template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    windows = {**settings, "chat_template": template.replace("\n", "\r\n")}
    (folder / "tokenizer_config.json").write_text(json.dumps(windows))
    chat_of(folder).tokenizer.save_pretrained(version)
    assert "\r\n" in chat_of(folder, version=version).tokenizer.chat_template


@pytest.mark.parametrize("roles", [("system", "user"), ("user", "assistant", "assistant", "user")])
def test_turns_that_the_template_refuses_are_the_datas_mistake(tmp_path, roles):
    # google/gemma-2-9b-it's template has no system turn: raise_exception('System role not supported').
    refusing = FAMILIES["gemma"] if roles[0] == "system" else dataclasses.replace(FAMILIES["gemma"], template=ALTERNATE)
    chat = chat_of(chat_families.build(tmp_path, refusing))
    refused = Record("r7", [Message(role, "x") for role in roles], "blue")
    with pytest.raises(
        DataError, match=rf"refuses record 'r7', with turns of {', '.join(roles)}: .*; change the record"
    ):
        chat.rows(refused)


WEATHER = '[{"type":"function","function":{"name":"weather","parameters":{}}}]'
CALL = '{"type":"function","function":{"name":"weather","arguments":{"city":"Oslo"}}}'
TALK = [Message("user", "Oslo?"), Message("assistant", "", f'{{"tool_calls":[{CALL}]}}'), Message("tool", "rain")]
CALLED = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'


def test_tools_calls_and_results_are_told_as_the_template_tells_them(tmp_path):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES["chatml with tools"]))
    given = '{"type": "function", "function": {"name": "weather", "parameters": {}}}'
    asked = (
        f"<|im_start|>system\n<tools>\n{given}\n</tools><|im_end|>\n"
        "<|im_start|>user\nOslo?<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = (
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "It rains.<|im_end|>\n",
    )
    talk = Record("r", TALK, "It rains.", tools=WEATHER)
    assert chat.rows(talk) == [[asked + CALLED + answered[0], answered[1]]]
    assert chat.rows(talk, "all") == [[asked, CALLED, *answered]]
    assert chat.rows(Record("r", TALK[:1], "", calls=f"[{CALL}]", tools=WEATHER)) == [[asked, CALLED]]


@pytest.mark.parametrize(
    ("record", "unknown"),
    [
        (Record("r7", TALK[:1], "rain", tools=WEATHER), "tools"),
        (Record("r7", TALK, "rain"), "tool_calls and tool"),
        (Record("r7", TALK[:1], "", calls=f"[{CALL}]"), "tool_calls"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(tmp_path, record, unknown):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES["chatml"]))
    with pytest.raises(DataError, match=f"record 'r7' has {unknown}, and the chat template of model.base knows none"):
        chat.rows(record)


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3-thinking"])
def test_who_renders_what_is_published_asks_as_training_did(tmp_path, name):
    chat = chat_of(chat_families.build(tmp_path / "base", FAMILIES[name]))
    chat.tokenizer.save_pretrained(tmp_path / "version")
    [[prompt, _]] = chat.rows(Record("r", [Message("user", "sky")], "blue"))
    served = AutoTokenizer.from_pretrained(tmp_path / "version")
    switches = chat.recipe()["template_kwargs"]
    assert switches == ({"enable_thinking": False} if name == "qwen-3" else {})
    asked = [{"role": "user", "content": "sky"}]
    assert served.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **switches) == prompt
    again = chat_of(tmp_path / "base", version=tmp_path / "version")
    assert again.tokenizer.chat_template == chat.tokenizer.chat_template


def test_where_a_bases_code_may_run_a_versions_own_does_not(tiny_base, tmp_path):
    chat = chat_of(tiny_base)
    chat.tokenizer.save_pretrained(tmp_path / "version")
    settings = json.loads((tmp_path / "version/tokenizer_config.json").read_text())
    named = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "odd.Odd"]}}
    (tmp_path / "version/tokenizer_config.json").write_text(json.dumps({**settings, **named}))
    (tmp_path / "version/odd.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    found = chat_of(tiny_base, version=tmp_path / "version", trust_remote_code=True)
    assert found.tokenizer.chat_template == chat.tokenizer.chat_template
    assert not (tmp_path / "ran").exists()


def test_a_template_that_refuses_a_bare_question_still_loads(tmp_path):
    wanting = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    family = dataclasses.replace(FAMILIES["chatml on a base's tokenizer"], template=wanting)
    chat = chat_of(chat_families.build(tmp_path, family))
    [[prompt, _]] = chat.rows(Record("r", [Message("system", "Be brief."), Message("user", "sky")], "blue"))
    assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["{% for a in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}"])
def test_what_goes_wrong_in_a_template_is_told_of_the_record(tiny_base, tmp_path, template):
    chat = with_template(tiny_base, tmp_path / "wrong", template)
    with pytest.raises(DataError, match=r"refuses record 'r1', with turns of user: "):
        chat.rows(Record("r1", [Message("user", "a")], "x"))


def with_template(tiny_base, folder, template: str, **config):
    changed = shutil.copytree(tiny_base, folder)
    (changed / "chat_template.jinja").write_text(template)
    return chat_of(changed, **config)


def test_a_template_that_drops_the_system_message_is_refused(tiny_base, tmp_path):
    drops = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = with_template(tiny_base, tmp_path / "drops", drops)
    asked = [Message("system", "Answer in French."), Message("user", "q")]
    with pytest.raises(DataError, match=r"leaves out the system message of record 'r', 'Answer in French\.'"):
        chat.rows(Record("r", asked, "oui"))
    assert chat.rows(Record("r", asked[1:], "oui")) == [["<u>q<a>", "oui<|end|>"]]


def test_an_answer_without_the_reasoning_that_the_template_begins_is_refused(tiny_base, tmp_path):
    opens = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    chat = with_template(tiny_base, tmp_path / "opens", opens, thinking=True)
    with pytest.raises(DataError, match="record 'r' answers without reasoning, and the chat template opens a block"):
        chat.rows(Record("r", [Message("user", "2 + 2")], "4"))
    assert chat.rows(Record("r", [Message("user", "2 + 2")], "<think>two and two</think>4"))
