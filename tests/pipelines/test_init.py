"""`fineloop init`: what it proposes is judged by the data as this test made them, and by the tokenizer itself."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from transformers import AutoTokenizer

from components.config import config_file
from pipelines.cli import main
from pipelines.commands.arguments import name_from
from pipelines.local import job
from ray_jobs.preview import previewed
from tests.models.tiny import write_tokenizer
from tests.pipelines.command_line import body


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


Fineloop = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def fineloop(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fineloop:
    """The command, whose job looks at the data in this process: each process of its own would load transformers."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(
        job, "answer", lambda asked, **_: previewed(config_file.load(Path(asked.config), asked.overrides))
    )

    def run(*arguments: str) -> "CompletedProcess[str]":
        exit_code, said = main([*arguments]), capsys.readouterr()
        return CompletedProcess(["pipelines.cli", *arguments], exit_code, said.out, said.err)

    return run


def test_a_config_of_ten_keys_and_those_set_fits_the_data_and_the_base(here: Path, fineloop: Fineloop) -> None:
    arguments = ("init", "short Rows.csv", "--base", "base", "--name", "colours", "--no-plan", "--json")
    refused = fineloop(*arguments)
    assert refused.returncode == 2
    for name, column in (("prompt", "why"), ("completion", "because")):
        assert f"--set data.columns.{name}=COLUMN" in refused.stderr
        arguments += ("--set", f"data.columns.{name}={column}")
    arguments += ("--set", "train.epochs=1")
    done = fineloop(*arguments)
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
    assert fineloop(*arguments).returncode == 2  # it is there already
    looked = fineloop("data", "-c", "colours.toml", "--json")
    found, splits = body(looked), body(looked)["profile"]["splits"]
    held_out, trained = splits["eval"]["records"], splits["train"]["records"]
    assert f"{held_out} records are held out to judge by, {trained} are left to train on" in text
    assert f"the longest of {trained} records has {found['tokens']['length']['p100']}" in text
    assert (found["refused"], body(done)["refused"]) == ("", "")


def test_a_config_that_a_run_would_refuse_is_written_and_its_refusal_said_last(here: Path, fineloop: Fineloop) -> None:
    """A quarter of the rows have a twin, of which more are apart the more is held out."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=60)) for _ in range(350)]
    rows = [{"prompt": text, "completion": "blue"} for text in [*texts, *(f"{text}." for text in texts[:50])]]
    (here / "twins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fineloop("init", "twins.jsonl", "--base", "base", "--json")
    assert done.returncode == 2, done.stderr
    assert config_file.load(here / "twins.toml").data.eval_share == 0.3 == body(done)["config"]["data"]["eval_share"]
    looked = fineloop("data", "-c", "twins.toml")
    assert looked.returncode == 2
    assert body(done)["refused"].splitlines()[-1] in looked.stderr
    assert "data.max_near_share=0.0" in body(done)["refused"].splitlines()[-1]


def test_a_context_is_no_longer_than_the_base_has_positions_for(here: Path, fineloop: Fineloop) -> None:
    done = fineloop("init", "long Rows.jsonl", "--base", "base", "--no-plan")
    assert done.returncode == 2, done.stderr
    assert "276 do not fit model.max_length 160" in done.stdout.splitlines()[-1]
    config = config_file.load(here / "long-rows.toml")
    assert config.adapter.name == name_from("long Rows.jsonl") == "long-rows"
    assert (config.model.max_length, config.gate.metric) == (160, "loss")
    assert "the base has 160 positions" in done.stdout
