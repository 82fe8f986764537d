"""`fineloop init`: what it proposes is judged by the data as this test made them, and by the tokenizer itself."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from components.config import config_file
from pipelines.local.proposed_config import name_from
from tests.models.tiny import write_tokenizer
from tests.pipelines.command_line import body, fineloop


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    for name, answer in (("short", "blue"), ("long", "because the light is scattered by what is in the air " * 6)):
        rows = [{"prompt": f"Why is number {place} so?", "completion": f"{answer}{place % 7}"} for place in range(400)]
        (folder / f"{name} Rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = ["why,because", *(f"{row['prompt']},{row['completion']}" for row in rows)]
        (folder / f"{name} Rows.csv").write_text("\n".join(lines))
    write_tokenizer(folder / "base")
    about = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 160}
    (folder / "base" / "config.json").write_text(json.dumps(about))
    return folder


def test_a_config_of_ten_commented_keys_and_those_set_fits_the_data_and_the_base(here: Path) -> None:
    arguments = ("init", "short Rows.csv", "--base", "base", "--name", "colours", "--no-plan", "--json")
    refused = fineloop(*arguments, cwd=here)
    assert refused.returncode == 2
    for name, column in (("prompt", "why"), ("completion", "because")):
        assert f"--set data.columns.{name}=COLUMN" in refused.stderr
        arguments += ("--set", f"data.columns.{name}={column}")
    arguments += ("--set", "train.epochs=1")
    done = fineloop(*arguments, cwd=here)
    assert done.returncode == 0, done.stderr
    text = (here / "colours.toml").read_text()
    keys = [line for line in text.splitlines() if " = " in line]
    assert len(keys) == 12
    assert all("  # " in line for line in keys)
    config = config_file.load(here / "colours.toml")
    assert (config.train.epochs, config.data.columns.prompt, config.data.columns.completion) == (1, "why", "because")
    assert body(done)["config"] == config_file.as_table(config, given_only=True)
    turns = [{"role": "user", "content": "Why is number 399 so?"}, {"role": "assistant", "content": "blue0"}]
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    longest = len(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])
    assert longest <= config.model.max_length == 128
    assert (config.gate.metric, config.data.eval_share) == ("exact_match", 0.3)
    assert fineloop(*arguments, cwd=here).returncode == 2  # it is there already


@pytest.mark.slow
def test_a_context_is_no_longer_than_the_base_has_positions_for(here: Path) -> None:
    done = fineloop("init", "long Rows.jsonl", "--base", "base", "--no-plan", cwd=here)
    assert done.returncode == 0, done.stderr
    config = config_file.load(here / "long-rows.toml")
    assert config.adapter.name == name_from("long Rows.jsonl") == "long-rows"
    assert (config.model.max_length, config.gate.metric) == (160, "loss")
    assert "the base has 160 positions" in done.stdout
