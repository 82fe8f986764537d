"""`fineloop init`: what it proposes is judged by the data as this test made them, and by the tokenizer itself."""

import copy
import functools
import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from transformers import AutoTokenizer

from components.config import config_file
from components.config.ray import RayConfig
from components.config.schema import AdapterConfig, RunConfig
from components.prepare.shapes import guessed
from pipelines.cli import main
from pipelines.commands.arguments import name_from
from pipelines.local import job
from pipelines.local.job import Job
from ray_jobs.base import base_model
from ray_jobs.plan import planned
from ray_jobs.planning import bases, capacity
from ray_jobs.planning.capacity import Device
from ray_jobs.planning.memory import MARGIN
from ray_jobs.preview import previewed
from tests.components.prepare import logged
from tests.models.tiny import write_tokenizer
from tests.pipelines.command_line import body


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    for name, answer in (("short", "blue"), ("long", "because the light is scattered by what is in the air " * 4)):
        rows = [{"prompt": f"Why is number {place} so?", "completion": f"{answer}{place % 7}"} for place in range(400)]
        (folder / f"{name} Rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = ["why,because", *(f"{row['prompt']},{row['completion']}" for row in rows)]
        (folder / f"{name} Rows.csv").write_text("\n".join(lines))
    write_tokenizer(folder / "base")
    about = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 160}
    (folder / "base" / "config.json").write_text(json.dumps(about))
    return folder


Fineloop = Callable[..., "CompletedProcess[str]"]


@functools.cache
def looked(toml: str) -> dict[str, Any]:
    """What the job says of a config's data, which is looked at once."""
    return previewed(config_file.loads(toml))


def of_the_data(config: RunConfig) -> str:
    """The config without what no look at the data reads."""
    train = config.train.model_copy(update={"batch_size": 16, "micro_batch_size": 8, "epochs": 1})
    others = {"adapter": AdapterConfig(name="any"), "ray": RayConfig(), "train": train}
    return config_file.dumps(config.model_copy(update=others))


@pytest.fixture
def fineloop(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fineloop:
    """The command, whose job looks at the data in this process: each process of its own would load transformers."""
    monkeypatch.chdir(here)

    def answer(asked: Job, **_: object) -> dict[str, Any]:
        config = config_file.load(Path(asked.config), asked.overrides)
        if asked.arguments:  # which bases fit
            return {"bases": list(bases.fitting(config, Device("a GPU", int(float(asked.arguments[1]) * 2**30))))}
        if config.model.base.startswith(("Qwen/", "HuggingFaceTB/")):  # no hub is here
            config = config_file.loads(config_file.dumps(config), ["model.base=base"])
        if asked.module == "ray_jobs.plan":
            return planned(config, base_model.read_config(config.model), capacity.named_device(config))
        return copy.deepcopy(looked(of_the_data(config)))

    monkeypatch.setattr(job, "answer", answer)

    def run(*arguments: str) -> "CompletedProcess[str]":
        exit_code, said = main([*arguments]), capsys.readouterr()
        return CompletedProcess(["pipelines.cli", *arguments], exit_code, said.out, said.err)

    return run


def test_a_config_of_a_dozen_keys_and_those_set_fits_the_data_and_the_base(here: Path, fineloop: Fineloop) -> None:
    arguments = ("init", "short Rows.csv", "--base", "base", "--name", "colours", "--no-plan", "--json")
    arguments += ("--set", "data.columns.prompt=why", "--set", "data.columns.completion=because")
    done = fineloop(*arguments, "--set", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    text = (here / "colours.toml").read_text()
    keys = [line for line in text.splitlines() if " = " in line]
    assert all("  # " in line for line in keys)
    config = config_file.load(here / "colours.toml")
    assert (config.train.epochs, config.data.columns.prompt, config.data.columns.completion) == (1, "why", "because")
    assert body(done)["config"] == config_file.as_table(config, given_only=True)
    turns = [{"role": "user", "content": "Why is number 399 so?"}, {"role": "assistant", "content": "blue0"}]
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    longest = len(tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])
    assert longest <= config.model.max_length == 128
    assert (config.gate.metric, config.data.eval_share) == ("exact_match", 0.3)
    assert (config.train.start_from, config.train.start_share) == ("production", 0.5)
    assert fineloop(*arguments).returncode == 2  # it is there already
    looked = fineloop("data", "-c", "colours.toml", "--json")
    found = body(looked)
    assert (found["refused"], body(done)["refused"]) == ("", "")
    assert found["gate"]["power"] == body(done)["power"]


def proposed(fineloop: Fineloop, name: str, *keys: str) -> RunConfig:
    """The config for the short rows, with these keys set."""
    Path(f"{name}.toml").unlink(missing_ok=True)
    arguments = [word for key in keys for word in ("--set", key)]
    done = fineloop("init", "short Rows.jsonl", "--base", "base", "--name", name, "--no-plan", *arguments)
    assert done.returncode == 0, done.stderr
    return config_file.load(Path(f"{name}.toml"))


def distinct(number: int, answer: Callable[[int], str]) -> str:
    """As many rows of which no two prompts are alike."""
    rng = random.Random(number)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=40)) for _ in range(number)]
    rows = [{"prompt": text, "completion": answer(place)} for place, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("rows", "answer", "margin", "enough"),
    [
        (400, "blue", 0.05, False),
        (5000, "blue", 0.02, True),
        (1000, "long " * 15, 0.05, True),
    ],
)
def test_the_margin_is_the_least_at_which_an_equal_version_passes_and_missing_rows_are_named(
    here: Path, fineloop: Fineloop, rows: int, answer: str, margin: float, enough: bool
) -> None:
    """Exact match with 6 % of answers changed takes (1.645 + 0.842)^2 0.06 / m^2 records: 928 at 0.02, 148 at 0.05."""
    (here / f"rows{rows}.jsonl").write_text(distinct(rows, lambda place: f"{answer}{place % 7}"))
    done = fineloop("init", f"rows{rows}.jsonl", "--base", "base", "--no-plan")
    config = config_file.load(here / f"rows{rows}.toml")
    assert config.gate.worse_than_champion_by == margin, done.stdout
    is_share = config.gate.metric == "exact_match"
    worse = f"{100 * margin:g} points worse" if is_share else f"{margin} nats per answer token worse"
    assert worse in done.stdout
    assert ("too few rows: with " in done.stdout) is not enough
    assert "nothing can replace it" not in done.stdout
    share = config.data.eval_share * rows * (1 - config.data.validation_share)
    needed = (1.645 + 0.842) ** 2 * 0.06 / margin**2 if is_share else 0
    assert (share >= needed) is enough


def test_a_few_very_long_answers_make_the_margin_wider_and_not_the_loop_stand(here: Path, fineloop: Fineloop) -> None:
    """One answer of 25 is twenty times as long, so that by Kish's formula five records weigh as one."""
    (here / "tail.jsonl").write_text(distinct(900, lambda place: f"some words {place} " * (5 if place % 25 else 100)))
    told = body(fineloop("init", "tail.jsonl", "--base", "base", "--no-plan", "--json"))
    assert 0.1 < told["power"]["equal_weight"] < 0.3
    assert (told["power"]["margin"], told["missing_rows"]) == (0.2, 0)
    assert told["power"]["records"] >= told["power"]["fewest"]


def nvidia(monkeypatch: pytest.MonkeyPatch, number: int, gpu: str = "") -> None:
    """The machine has so many GPUs, as NVIDIA's library tells Ray, and nvidia-smi whoever asks for their memory."""
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: number))
    if gpu:
        program = Path("bin", "nvidia-smi").absolute()
        program.parent.mkdir(exist_ok=True)
        asked = '[ "$*" = "--query-gpu=name,memory.total --format=csv,noheader" ] || exit 2'
        program.write_text("\n".join(["#!/bin/sh", asked, *[f"echo '{gpu}'"] * number]))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_bases_that_fit_the_gpu_are_proposed_the_largest_first(here, fineloop, monkeypatch):
    """With a single layer, as each takes time to plan; planning/test_bases.py plans all."""
    shapes = {f"Qwen/{width}": ("qwen3", (1, width, 3 * width, 8, 8), 9_000, True) for width in (65_536, 2048, 1024)}
    monkeypatch.setattr(bases, "BASES", shapes)
    monkeypatch.setattr(f"{__name__}.planned", lambda *_: {"fits": True})
    monkeypatch.setattr("pipelines.commands.run.plan_lines", lambda *_: ["it fits"])
    nvidia(monkeypatch, 1, "Tesla T4, 15360 MiB")
    done = fineloop("init", "short Rows.jsonl", "--name", "bases", "--json")
    assert (done.returncode, body(done)["plan"]) == (0, {"fits": True}), done.stderr
    proposed = body(done)["bases"]
    assert [base["base"] for base in proposed] == ["Qwen/2048", "Qwen/1024"]
    assert config_file.load(here / "bases.toml").model.base == "Qwen/2048"
    assert all(base["memory_bytes"] * (1 + MARGIN) <= 15 * 2**30 for base in proposed)


def test_a_start_from_the_base_is_kept(fineloop: Fineloop) -> None:
    assert proposed(fineloop, "base-start", "train.start_from=base").train.start_share == 0


@pytest.mark.parametrize(("keys", "cores"), [([], 7), (["ray.num_workers=2"], 1), (["ray.cpus_per_worker=3"], 3)])
def test_without_a_gpu_a_worker_gets_all_cores_unless_workers_are_set(fineloop, monkeypatch, keys, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    assert proposed(fineloop, "cores", *keys).ray.cpus_per_worker == cores


@pytest.mark.parametrize(
    ("gpus", "keys", "workers", "batch", "at_once"),
    [
        (1, [], 1, 16, 8),
        (3, [], 3, 15, 5),
        (8, [], 8, 16, 2),
        (3, ["train.batch_size=32"], 2, 32, 8),
        (3, ["train.batch_size=36", "train.micro_batch_size=4"], 3, 36, 4),
        (3, ["ray.num_workers=2", "ray.use_gpu=true"], 2, 16, 8),
        (3, ["ray.num_workers=3", "ray.use_gpu=false", "train.batch_size=24"], 3, 24, 8),
    ],
)
def test_the_gpus_of_a_machine_share_its_steps_evenly(fineloop, monkeypatch, gpus, keys, workers, batch, at_once):
    nvidia(monkeypatch, gpus)
    config = proposed(fineloop, "gpus", *keys)
    train = config.train
    assert (config.ray.num_workers, train.batch_size, train.micro_batch_size) == (workers, batch, at_once)
    assert config.ray.use_gpu is ("ray.use_gpu=false" not in keys)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


TICKETS = "Ticket ID,Subject,Team,Notes\n" + "".join(
    f"{number},Where is parcel {number * 7919 % 1000} of {number}?,{('post', 'bank')[number % 2]},x{number * 31}\n"
    for number in range(300)
)


def test_columns_are_asked_for_with_samples_and_the_base_after_them(here, fineloop, monkeypatch):
    (here / "tickets.csv").write_text(TICKETS)
    monkeypatch.setattr("sys.stdin", Terminal("\n\n\nbase\n"))  # the name, the prompt and the answer as guessed
    done = fineloop("init", "tickets.csv", "--no-plan", "--set", "data.max_reject_share=1")
    texts = ("the adapter's name", "2  Subject: Where is", "the answer's column", "the base model (this one is")
    asked = [done.stderr.index(text) for text in texts]
    assert asked == sorted(asked)
    assert "in their order [Subject]" in done.stderr
    columns = config_file.load(here / "tickets.toml").data.columns
    assert (columns.prompt, columns.completion) == ("Subject", "Team")


def test_names_that_say_it_are_columns_without_a_question() -> None:
    assert guessed(["id", "Title", "Label", "Description"]) == (["Title", "Description"], "Label")


def test_a_number_or_a_name_in_any_case_names_a_column(here, fineloop, monkeypatch):
    (here / "numbered.csv").write_text(TICKETS)
    monkeypatch.setattr("sys.stdin", Terminal("4, subject\n3\nbase\n"))
    fineloop("init", "numbered.csv", "--name", "numbered", "--no-plan", "--set", "data.max_reject_share=1")
    columns = config_file.load(here / "numbered.toml").data.columns
    assert (columns.prompt, columns.completion) == (["Notes", "Subject"], "Team")
    monkeypatch.setattr("sys.stdin", Terminal("9\n"))
    refused = fineloop("init", "numbered.csv", "--name", "other", "--no-plan")
    assert refused.returncode == 2
    assert "'9' is no column: type a number from 1 to 4" in refused.stderr


def test_the_file_is_written_where_an_answer_is_missing_and_finished_when_it_is_there(here, fineloop):
    (here / "open.csv").write_text(TICKETS)
    arguments = ("init", "open.csv", "--base", "base", "--no-plan", "--set", "data.max_reject_share=1")
    done = fineloop(*arguments, "--json")
    assert done.returncode == 2
    text = (here / "open.toml").read_text()
    assert '# columns.completion = "COLUMN"' in text
    assert config_file.load(here / "open.toml").data.columns.prompt == "Subject"
    assert "data.columns.completion" in body(done)["refused"]
    (here / "open.toml").write_text(text.replace('# columns.completion = "COLUMN"', 'columns.completion = "Team"'))
    done = fineloop(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    columns = config_file.load(here / "open.toml").data.columns
    assert (columns.prompt, columns.completion) == ("Subject", "Team")


def test_a_log_of_which_nothing_may_judge_is_written_for_an_audit_and_finished_by_it(here, fineloop):
    made = logged.generated(1_500, seed=5)
    for name, rows in (("served", made.rows), ("said", made.feedback)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("init", "served.jsonl", "--base", "base", "--no-plan", "--set")
    done = fineloop(*arguments, 'data.feedback=["said.jsonl"]', "--json")
    assert done.returncode == 2
    assert "fineloop data audit" in body(done)["refused"]
    assert config_file.load(here / "served.toml").data.feedback == ["said.jsonl"]
    drawn = fineloop("data", "audit", "100", "-c", "served.toml", "--output", "audit.jsonl")
    assert drawn.returncode == 0, drawn.stderr
    rows = [json.loads(line) for line in (here / "audit.jsonl").read_text().splitlines()]
    for row in rows:
        row["label"] = f"right words of {row['response_id']}"
    (here / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fineloop(*arguments, 'data.feedback=["said.jsonl", "audit.jsonl"]', "--json")
    assert "may judge" not in body(done)["refused"]
    assert not (here / "served.toml").read_text().startswith("# Unfinished")
    assert body(done)["power"]["records"] >= 30  # as many sessions


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
    assert "data.max_reject_share=0.0" in body(done)["refused"].splitlines()[-1]


def test_a_context_is_no_longer_than_the_base_has_positions_for(here: Path, fineloop: Fineloop) -> None:
    done = fineloop("init", "long Rows.jsonl", "--base", "base", "--no-plan")
    assert done.returncode == 2, done.stderr
    assert re.search(r"of (\d+) records \1 do not fit model.max_length 160", done.stdout.splitlines()[-1])
    config = config_file.load(here / "long-rows.toml")
    assert config.adapter.name == name_from("long Rows.jsonl") == "long-rows"
    assert (config.model.max_length, config.gate.metric) == (160, "loss")
    assert "the base has 160 positions" in done.stdout
