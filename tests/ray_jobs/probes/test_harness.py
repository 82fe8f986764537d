"""Tasks of lm-evaluation-harness: what is refused without it, what is made of its results, and that with it a model
scores what plain transformers computes.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.records.steps import HarnessScores, TaskScore
from components.registry.versions import Version
from components.shared.errors import ConfigError
from components.store.store import Store
from ray_jobs.kernels.door import Kernels
from ray_jobs.probes import harness
from ray_jobs.scoring.measure import measure_shard, merged
from tests.models.tiny import colour_rows
from tests.models.tiny_version import contenders, publish, remember

RECORDS = [Record(row["id"], [Message("user", row["prompt"])], row["completion"]) for row in colour_rows(2)]
DOCUMENTS = [
    {"q": "The colour of the sky is", "choices": ["blue", "red", "green"], "gold": 0},
    {"q": "The colour of grass is", "choices": ["blue", "red", "green"], "gold": 2},
    {"q": "The colour of blood is", "choices": ["blue", "red", "green"], "gold": 1},
    {"q": "The colour of snow is", "choices": ["white", "black", "red"], "gold": 0},
    {"q": "Of coal, the colour is", "choices": ["white", "black", "red"], "gold": 1},
]
TASK = """\
task: fineloop_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: brier_score}}]
metadata: {{version: 1.0}}
"""
SCORES = (TaskScore(task="colours", metric="acc", value=0.5, stderr=0.25),)
EVERYBODY = {"base", "champion", "candidate"}


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    return config_file.loads(config_file.dumps(config), overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tasks"
    found.mkdir()
    data = found / "colours.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    (found / "colours.yaml").write_text(TASK.format(data=data))
    return found


@pytest.fixture
def config(config: RunConfig, store: Store, folder: Path) -> RunConfig:
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    asked = ["evaluate.lm_eval=['fineloop_colours']", f"evaluate.lm_eval_include={folder}"]
    return changed(config, *place, *asked, "evaluate.general_passages=0")


@pytest.fixture
def version(config: RunConfig, store: Store, tmp_path: Path) -> Version:
    return publish(config, store, tmp_path, with_data=False)


@pytest.fixture
def known_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides whom tasks are run on, without lm-eval."""
    monkeypatch.setattr(harness, "check", lambda config: None)
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.13")


def asked(config: RunConfig, store: Store, *versions: Version) -> harness.Tasks:
    return harness.prepare(store, None, config, contenders(config, *versions))


def test_without_lm_eval_tasks_are_refused_before_anything_is_trained(config, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    harness._manager.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'fineloop\[eval\]', here and in the image of the Ray workers"):
        harness.check(config)
    harness.check(changed(config, "evaluate.lm_eval=[]"))


def test_results_are_read_as_lm_eval_writes_them() -> None:
    # As `lm_eval --tasks gsm8k,mmlu` of 0.4.13 writes its results, but for most of the tasks.
    results = {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.0193,
            "exact_match,flexible-extract": float("nan"),
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.004, "alias": "mmlu"},
    }
    assert list(harness.parsed(results)) == [
        TaskScore(task="gsm8k", metric="exact_match (strict-match)", value=0.25, stderr=0.0193),
        TaskScore(task="gsm8k", metric="exact_match (flexible-extract)", value=None, stderr=None),
        TaskScore(task="mmlu", metric="acc", value=0.5, stderr=0.004),
    ]


def test_tasks_are_told_in_a_line_each() -> None:
    worse = SCORES[0].model_copy(update={"value": 0.25, "stderr": None})
    group = HarnessScores(lm_eval="0.4.13", tasks=("colours",), scores={"base": SCORES, "candidate": (worse,)})
    assert group.summary == ["lm-eval colours: acc base 0.5 ± 0.25, candidate 0.25"]
    assert group.model_copy(update={"tasks": ("a_tag",)}).summary == group.summary
    tasks = harness.Tasks("", frozenset({"candidate"}), group).held_together()
    assert tasks.roles == frozenset()
    assert tasks.outcome([], None).lines == ["lm-eval: left out, as its workers hold the base together"]


def test_what_an_earlier_run_has_found_is_not_run_again(config, store, version, folder, known_tasks) -> None:
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    tasks = asked(config, store, champion, candidate)
    assert tasks.roles == EVERYBODY
    remember(store, config, champion, harness=tasks.outcome([{"base": SCORES, "candidate": SCORES}], None).record)
    again = asked(config, store, champion, candidate)
    assert again.roles == {"candidate"}
    assert again.known.scores == {"base": SCORES, "champion": SCORES}
    assert list(again.outcome([{}, {"candidate": SCORES}], None).record.scores) == ["base", "champion", "candidate"]
    assert again.at(lambda count: range(1, count, 2)).roles == frozenset()

    assert asked(changed(config, "method.base=nf4"), store, champion, candidate).roles == {"base", "candidate"}
    for other in ("evaluate.lm_eval_limit=2", "evaluate.lm_eval=['fineloop_colours','arc_easy']"):
        assert asked(changed(config, other), store, champion, candidate).roles == EVERYBODY
    assert asked(changed(config, "evaluate.lm_eval=[]"), store, champion, candidate) == harness.NO_TASKS
    (folder / "colours.jsonl").write_text(json.dumps(DOCUMENTS[0]))
    assert asked(config, store, champion, candidate).roles == EVERYBODY


def test_another_lm_eval_has_other_tasks(config, store, version, known_tasks, monkeypatch) -> None:
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    ran = [{"base": SCORES, "candidate": SCORES}]
    before = asked(config, store, champion).outcome(ran, None).record
    remember(store, config, champion, harness=before)
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.14")
    assert asked(config, store, champion, candidate).roles == EVERYBODY


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    pytest.importorskip("lm_eval")
    harness._manager.cache_clear()


@pytest.mark.filterwarnings("default")  # of lm-eval, datasets and what they import
def test_a_task_that_is_not_there_is_named(installed, config, tmp_path) -> None:
    harness.check(config)
    with pytest.raises(ConfigError, match=r"knows no task fineloop_colors: `lm-eval ls tasks` lists"):
        harness.check(changed(config, "evaluate.lm_eval=['fineloop_colours','fineloop_colors']"))
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval_include .*missing is no folder"):
        harness.check(changed(config, f"evaluate.lm_eval_include={tmp_path / 'missing'}"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("base", "matmul_dtype"), [("bf16", "bfloat16"), ("nf4", "float32")])
def test_a_model_scores_what_plain_transformers_computes(
    installed, config, store, tmp_path, base, matmul_dtype, capfd
) -> None:
    config = changed(config, f"method.base={base}")
    version = publish(config, store, tmp_path, with_data=False)
    tasks = asked(config, store, version)
    first, other = (
        measure_shard(
            contenders(config, version),
            RECORDS,
            {"tasks": tasks.at(lambda count, index=index: range(index, count, 2))},
            shard_index=index,
            kernels=Kernels(matmul_dtype),
        )
        for index in range(2)
    )
    assert other.shares == [{"tasks": {}}]
    shares = merged([first, other]).shares
    found = tasks.outcome([share["tasks"] for share in shares], None).record
    assert found.scores.keys() == {"base", "candidate"}
    assert "loglikelihood requests" not in capfd.readouterr().err  # the bar of progress
    accuracy = found.score("base", "fineloop_colours", "acc")
    assert accuracy.stderr == pytest.approx((accuracy.value * (1 - accuracy.value) / (len(DOCUMENTS) - 1)) ** 0.5)
    brier = {role: found.score(role, "fineloop_colours", "brier_score") for role in ("base", "candidate")}
    assert brier["base"].stderr is None  # lm-eval knows none of it
    assert brier["candidate"].value != brier["base"].value
    if base != "bf16":
        return
    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    model = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    right, brier_sum = 0, 0.0
    for document in DOCUMENTS:
        log_p = torch.tensor([answer_log_p(model, tokenizer, document["q"], " " + c) for c in document["choices"]])
        right += int(log_p.argmax()) == document["gold"]
        truth = torch.nn.functional.one_hot(torch.tensor(document["gold"]), 3)
        brier_sum += float(((log_p.softmax(0) - truth) ** 2).sum())
    assert accuracy.value == pytest.approx(right / len(DOCUMENTS))
    assert brier["base"].value == pytest.approx(brier_sum / len(DOCUMENTS), rel=0.01)  # the base is in bfloat16


def answer_log_p(model, tokenizer, question: str, answer: str) -> float:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (question, answer)]
    with torch.inference_mode():
        log_p = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
    return sum(log_p[len(ids[0]) - 1 + place, token].item() for place, token in enumerate(ids[1]))
