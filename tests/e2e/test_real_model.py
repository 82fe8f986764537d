"""The built-in example as `make run` runs it, on fewer records: promoted, held, and loaded by strangers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.prepare.icd10 import rows as example_rows
from tests.e2e.conftest import Home, settings
from tests.journeys.conftest import Done

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_RECORDS, NUM_EVALUATED, NUM_ASKED = 900, 72, 12  # of the example's 2300 and 250, for time
# As a stranger would use a pulled adapter: transformers and peft alone.
PLAIN_SCRIPT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base, adapter, prompts = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(base)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).eval()
answers = []
for turns in prompts:
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    answers.append(tokenizer.decode(out[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True).strip())
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def first(home: Home) -> Done:
    """The first run in a fresh home."""
    fewer = {"data.max_records": NUM_RECORDS, "evaluate.records": NUM_EVALUATED}
    return home.does("run", *settings(fewer))


@pytest.fixture(scope="module", autouse=True)
def _store(home: Home):
    home.does("store", "up")
    yield
    home.does("ray", "down")  # the last run's, which uses the store until it has ended
    home.does("store", "down")


def test_the_candidate_beats_the_base_and_is_promoted(first: Done):
    answer = first.answer
    assert answer["decision"] == "promote"
    assert answer["promoted"] is True
    assert answer["metrics"]["champion"] is None
    base, candidate = answer["metrics"]["base"], answer["metrics"]["candidate"]
    assert candidate["exact_match"] >= 0.5
    assert candidate["exact_match"] - base["exact_match"] > 0.4
    assert candidate["loss"] < 0.5 * base["loss"]
    assert {"prepare", "finetune", "evaluate", "gate", "promote", "report"} <= answer["timings_s"].keys()


@pytest.mark.full
def test_a_plain_peft_script_gives_the_evaluated_answers(home: Home, first: Done, tmp_path: Path):
    pulled = home.fineloop("adapters", "pull", "icd10-chapters", "--to", str(tmp_path / "adapter")).answer
    assert pulled["verified"] is True
    with home.store() as store:
        store.download(f"runs/{first.answer['run_id']}/evaluation_records.parquet", tmp_path / "records.parquet")
    records = pq.read_table(tmp_path / "records.parquet").to_pylist()
    assert len(records) == NUM_EVALUATED
    records = records[:NUM_ASKED]
    prompts = [[{"role": role, "content": text} for role, text in json.loads(row["prompt"])] for row in records]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (base,) = (home.path / "cache" / "bases").glob("gguf-*[!k]")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_SCRIPT, str(base), pulled["path"], str(tmp_path / "prompts.json")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    answers = json.loads(done.stdout.splitlines()[-1])
    # Batched and single products round differently in bfloat16: a tie may fall the other way.
    same = sum(ours == record["candidate_answer"] for ours, record in zip(answers, records, strict=True))
    assert same >= len(records) - 1


@pytest.mark.full
def test_shuffled_labels_are_held_and_production_stays(home: Home, first: Done, tmp_path: Path):
    rows = random.Random(0).sample(list(example_rows()), 600)
    answers = [row["messages"][-1]["content"] for row in rows]
    random.Random(1).shuffle(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["messages"][-1]["content"] = answer
    source = tmp_path / "shuffled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"train.max_steps": 8, "evaluate.records": 40, "evaluate.max_new_tokens": 4}
    held = home.does("run", *settings({"data.source": source, **short}))
    assert held.answer["decision"] == "hold"
    assert held.answer["promoted"] is False
    assert any("depend on" in reason for reason in held.answer["reasons"])
    assert held.answer["metrics"]["champion"] is not None
    production = home.fineloop("adapters", "show", "icd10-chapters@production").answer
    assert production["version"] == first.answer["version"] != held.answer["version"]
    kinds = [event["kind"] for event in home.fineloop("adapters", "history", "icd10-chapters").answer["events"]]
    assert kinds.count("promoted") == 1
    assert kinds.count("refused") == 1
