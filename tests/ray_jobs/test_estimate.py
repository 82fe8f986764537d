"""How long a run takes: what is counted against what `prepare` publishes, and the arithmetic on known paces.

That the estimate is near the truth is for whole runs to show, which print it before they start.
"""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from transformers import LlamaConfig, Qwen3Config

from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import load_split
from components.prepare.prepare import prepare
from components.shared.cpus import Cpu
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.estimate import OVERHEAD, Work, counted, estimate_of, estimated
from ray_jobs.kernels import processor
from ray_jobs.kernels.door import Kernels
from ray_jobs.planning import pace
from ray_jobs.planning.pace import MeanBatch, Pace
from ray_jobs.text import chat_format
from ray_jobs.text.batching import tokenize
from tests.models import zoo
from tests.models.tiny import colour_rows

TWO_CORES = Cpu("any", "AVX2", 2)
WORK = Work(train_records=1600, eval_records=200, length=30.0, answers=4.0, new_tokens=8)
PACE = Pace(train_s=0.01, read_s=0.004, write_s=0.25, kernels=Kernels("float32"))


def with_changes(config: RunConfig, *changes: str) -> RunConfig:
    return config_file.loads(config_file.dumps(config), changes)


@pytest.fixture
def data(config: RunConfig, tmp_path: Path) -> RunConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(700)))
    return with_changes(config, f"data.source={path}", "data.max_records=600")


def test_the_records_counted_are_those_that_prepare_publishes(data: RunConfig, store: Store):
    work = counted(data)
    prepared = prepare(data, store)
    assert (work.train_records, work.eval_records) == (prepared.train_records, prepared.eval_records)
    base = base_model.resolve(data.model)
    chat = chat_format.load(base, data.model)
    whole = tokenize(load_split(store, prepared.uri, "train"), chat, data.model.max_length)
    assert work.length == pytest.approx(whole.lengths.mean(), rel=0.02)
    assert work.answers == pytest.approx(whole.num_answer_tokens.mean(), rel=0.05)
    assert work.new_tokens == 8


def test_what_records_begin_with_is_counted_once_for_each_pass(data: RunConfig):
    rows = [{**row, "prompt": f"What colour is it? {row['prompt']}"} for row in colour_rows(700)]
    Path(str(data.data.source)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = counted(data)
    begin = len("<|user|>What colour is it? ") - len("<|user|>") + 1  # the tiny base's tokens are bytes
    saved = begin * (1 - 1 / data.train.micro_batch_size)
    assert 1 - work.computed == pytest.approx(saved / work.length, rel=0.05)
    assert counted(with_changes(data, "train.packing=false")).computed == 1.0
    faster, slower = (estimate_of(data, each, PACE, TWO_CORES) for each in (work, replace(work, computed=1.0)))
    assert faster.tokens_per_s * work.computed == pytest.approx(slower.tokens_per_s)


def test_training_takes_the_time_of_its_tokens_and_its_measurements(config: RunConfig):
    config = with_changes(config, "train.evals_per_epoch=0", "train.eval_records=1")
    found = estimate_of(config, WORK, PACE, TWO_CORES)
    assert found.tokens_per_s == pytest.approx(2 / (0.01 * OVERHEAD))  # two workers at once
    assert found.train_s == pytest.approx(1600 * 30 / found.tokens_per_s, rel=0.01)
    longer = estimate_of(with_changes(config, "train.epochs=3"), WORK, PACE, TWO_CORES)
    assert longer.train_s == pytest.approx(3 * found.train_s, rel=0.01)
    cut = estimate_of(with_changes(config, "train.max_steps=10"), WORK, PACE, TWO_CORES)
    assert cut.train_s == pytest.approx(found.train_s / 10, rel=0.02)


def test_workers_beyond_the_cores_gain_nothing(config: RunConfig):
    found = [
        estimate_of(with_changes(config, f"ray.num_workers={n}", "train.micro_batch_size=2"), WORK, PACE, TWO_CORES)
        for n in (1, 2, 4)
    ]
    assert found[0].tokens_per_s == pytest.approx(found[1].tokens_per_s / 2)
    assert found[2].tokens_per_s == found[1].tokens_per_s


def test_evaluation_reads_and_answers_for_the_base_and_the_candidate(config: RunConfig):
    config = with_changes(config, "evaluate.records=64", "evaluate.batch_size=32")
    found = estimate_of(config, WORK, PACE, TWO_CORES)
    reading, answering = 5 * 64 * 30 * 0.004 / 2, 2 * 1 * 8 * 0.25
    assert found.evaluate_s == pytest.approx(reading + answering, rel=0.05)
    assert found.run_s > found.train_s + found.evaluate_s


def test_a_pace_grows_with_the_layers_and_with_the_vocabulary(config: RunConfig):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    batch = MeanBatch(records=2, length=20, answers=4, generated=8)

    def measured(layers: int, vocabulary: int) -> Pace:
        base = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=vocabulary)
        with (
            mock.patch.object(pace, "_seconds", return_value=1.0),
            mock.patch.object(processor, "measure", return_value=processor.Rates(bfloat16=1e9, float32=2e9)),
        ):
            return pace.measure(config, base, batch)

    few, many = measured(2, 300), measured(24, 300)
    assert many.kernels == Kernels("float32")
    assert few.train_s == pytest.approx(1 / 40, rel=0.01)  # one second for 2 records of 20 tokens, on all its layers
    assert many.train_s == pytest.approx(12 * few.train_s, rel=0.01)
    assert many.write_s == pytest.approx(12, rel=0.01)
    wide = measured(2, 300_000)
    head_s = 2 * 300_000 * 64 / 2e9
    assert wide.read_s - few.read_s == pytest.approx(head_s * 4 / 20, rel=0.01)
    assert wide.train_s - few.train_s == pytest.approx(2 * head_s * 4 / 20, rel=0.01)
    assert wide.write_s - few.write_s == pytest.approx(8 * head_s, rel=0.01)


@pytest.mark.parametrize("changes", [["method.name=qlora"], ["method.name=dvora"], ["method.base=int8"]], ids=" ".join)
def test_a_few_layers_are_really_trained_and_read(config: RunConfig, changes: list[str]):
    base = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=500,
    )  # fmt: skip
    found = pace.measure(with_changes(config, *changes), base, MeanBatch(2, 20, 4, 8))
    assert min(found.train_s, found.read_s, found.write_s) > 0
    assert base.num_hidden_layers == 6


def test_a_few_layers_of_a_base_that_is_quantised_already_are_too(config: RunConfig):
    base = zoo.KINDS["Llama, tied"].config()
    base.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert pace.measure(with_changes(config, "method.name=qlora"), base, MeanBatch(2, 20, 4, 8)).train_s > 0


def test_layers_with_embeddings_of_their_own_are_measured_on_few_tokens_too(config: RunConfig):
    base = zoo.KINDS["Gemma 4"].config()
    assert base.vocab_size_per_layer_input < pace.VOCABULARY
    assert pace.measure(config, base, MeanBatch(2, 20, 4, 8)).train_s > 0


def test_data_in_s3_leave_the_time_open_and_the_speed_known(config: RunConfig):
    body = estimated(with_changes(config, "data.source=s3://bucket/rows.jsonl"))
    assert body["tokens_per_s"] > 0
    assert (body["train_s"], body["run_s"]) == (None, None)
    assert "S3" in body["unknown_because"]


def test_a_base_that_no_layer_can_be_made_of_is_no_failure(data: RunConfig):
    with mock.patch.object(pace, "measure", side_effect=RuntimeError("no such kernel")):
        body = estimated(data)
    assert body["unknown_because"] == "no such kernel"
    assert body["processor"]["cores"] >= 1
    assert body["tokens_per_s"] is None
