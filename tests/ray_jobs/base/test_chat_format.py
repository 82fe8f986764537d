"""How conversations read to a base, and where its answers end."""

import json
import shutil

import pytest

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError
from ray_jobs.base import chat_format
from ray_jobs.base.base_model import Base
from tests.models import chat_families
from tests.models.chat_families import FAMILIES


def chat_of(folder, **config):
    return chat_format.load(Base("base", folder, {}), ModelConfig(base=str(folder), **config))


def test_a_base_without_chat_template_gets_the_plain_one(tiny_base, tmp_path):
    plain = shutil.copytree(tiny_base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    tokenizer = chat_of(plain).tokenizer
    turns = [{"role": "user", "content": "sky"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "sky\n\n"
    answered = [*turns, {"role": "assistant", "content": "blue"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "sky\n\nblue<|end|>"


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


def test_decoding_is_greedy_and_nothing_else(tmp_path):
    chat = chat_of(chat_families.build(tmp_path, FAMILIES["gemma"]))
    said = chat.generation_config().to_diff_dict()
    assert set(said) <= {"do_sample", "eos_token_id", "pad_token_id", "transformers_version"}
    assert said["eos_token_id"] == sorted(chat.stops)
