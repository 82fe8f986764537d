"""Tasks of lm-evaluation-harness: without it, and with it against plain transformers."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config.schema import RunConfig
from components.records.steps import HarnessScores, TaskScore
from components.registry.versions import Version
from components.shared.errors import ConfigError
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.kernels.door import Kernels
from ray_jobs.probes import harness
from ray_jobs.probes.tasks import checks
from ray_jobs.scoring.measure import measure_shard, merged
from ray_jobs.text import chat_format
from tests.models import tiny_version
from tests.models.spec import changed
from tests.models.tiny_version import contenders, publish, remember

RECORDS = tiny_version.RECORDS[:2]
DOCUMENTS = [
    {"q": "The colour of the sky is", "choices": ["blue", "red", "green"], "gold": 0},
    {"q": "The colour of grass is", "choices": ["blue", "red", "green"], "gold": 2},
    {"q": "The colour of blood is", "choices": ["blue", "red", "green"], "gold": 1},
    {"q": "The colour of snow is", "choices": ["white", "black", "red"], "gold": 0},
    {"q": "Of coal, the colour is", "choices": ["white", "black", "red"], "gold": 1},
]
TASK = """\
task: our_colours
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "tasks"
    found.mkdir()
    data = found / "colours.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    (found / "colours.yaml").write_text(TASK.format(data=data))
    return found


@pytest.fixture
def config(placed: Callable[..., RunConfig], folder: Path) -> RunConfig:
    asked = ["evaluate.lm_eval=['our_colours']", f"evaluate.lm_eval_include={folder}"]
    return placed(*asked, "evaluate.general_passages=0")


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
    marks = [{"filter": "strict-match", "exact_match": mark} for mark in (1.0, 0.0)]
    samples = {"gsm8k": [*marks, {"filter": "flexible-extract", "exact_match": 0.5}]}
    better = {"mmlu": {"acc": False}}
    assert list(harness.parsed({"results": results, "samples": samples, "higher_is_better": better})) == [
        TaskScore(task="gsm8k", metric="exact_match (strict-match)", value=0.25, stderr=0.0193, passes=(True, False)),
        TaskScore(task="gsm8k", metric="exact_match (flexible-extract)", value=None, stderr=None),
        TaskScore(task="mmlu", metric="acc", value=0.5, stderr=0.004, lower_is_better=True),
    ]


def test_tasks_are_told_in_a_line_each() -> None:
    worse = SCORES[0].model_copy(update={"value": 0.25, "stderr": None})
    group = HarnessScores(lm_eval="0.4.13", tasks=("colours",), scores={"base": SCORES, "candidate": (worse,)})
    assert group.summary == ["lm-eval colours: acc base 0.5 ± 0.25, candidate 0.25"]
    tasks = harness.Tasks("", frozenset({"candidate"}), group).held_together()
    assert tasks.roles == frozenset()
    assert tasks.outcome([], None).lines == ["lm-eval: left out, as its workers hold the base together"]


@pytest.mark.usefixtures("known_tasks")
def test_what_an_earlier_run_has_found_is_not_run_again(config, store, version, folder, monkeypatch) -> None:
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    tasks = asked(config, store, champion, candidate)
    assert tasks.roles == EVERYBODY
    remember(store, config, champion, harness=tasks.outcome([{"base": SCORES, "candidate": SCORES}], None).record)
    again = asked(config, store, champion, candidate)
    assert again.roles == {"candidate"}
    assert again.record.scores == {"base": SCORES, "champion": SCORES}
    assert list(again.outcome([{}, {"candidate": SCORES}], None).record.scores) == ["base", "champion", "candidate"]
    assert again.at(lambda count: range(1, count, 2)).roles == frozenset()

    assert asked(changed(config, "method.base=nf4"), store, champion, candidate).roles == {"base", "candidate"}
    for other in ("evaluate.lm_eval_limit=2", "evaluate.lm_eval=['our_colours','arc_easy']"):
        assert asked(changed(config, other), store, champion, candidate).roles == EVERYBODY
    assert asked(changed(config, "evaluate.lm_eval=[]"), store, champion, candidate) == harness.NO_TASKS
    with monkeypatch.context() as patched:
        patched.setattr(harness.metadata, "version", lambda name: "0.4.14")
        assert asked(config, store, champion, candidate).roles == EVERYBODY
    (folder / "colours.jsonl").write_text(json.dumps(DOCUMENTS[0]))
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
    with pytest.raises(ConfigError, match=r"knows no task our_colors: `lm-eval ls tasks` lists"):
        harness.check(changed(config, "evaluate.lm_eval=['our_colours','our_colors']"))
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
    accuracy = found.score("base", "our_colours", "acc")
    assert sum(accuracy.passes) == accuracy.value * len(DOCUMENTS)
    assert accuracy.stderr == pytest.approx((accuracy.value * (1 - accuracy.value) / (len(DOCUMENTS) - 1)) ** 0.5)
    brier = {role: found.score(role, "our_colours", "brier_score") for role in ("base", "candidate")}
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


@pytest.mark.filterwarnings("default")
def test_fineloops_own_tasks_are_put_in_the_chat_template_and_scored(installed, config, store, tmp_path) -> None:
    names = [each.stem for each in sorted(harness.TASKS.glob("fineloop_*.yaml"))]
    config = changed(config, f"evaluate.lm_eval={names}", "evaluate.lm_eval_include=", "evaluate.lm_eval_limit=2")
    harness.check(config)
    version = publish(config, store, tmp_path, with_data=False)
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    tasks = harness.prepare(store, chat, config, contenders(config, version))
    assert tasks.record.include_sha256
    prompts = []
    template = chat.tokenizer.apply_chat_template
    chat.tokenizer.apply_chat_template = lambda *how, **more: prompts.append(template(*how, **more)) or prompts[-1]
    model = base_model.load_model(base_model.resolve(config.model), config.model, "bf16", use_gpu=False)
    found = harness.run(tasks, model.float(), chat, 2)
    assert [(score.task, score.metric, len(score.passes)) for score in found] == [(name, "passes", 2) for name in names]
    assert {score.value for score in found if score.task == "fineloop_json"} == {0.0}
    assert len({*prompts}) == 2 * len(names)


# What the tasks' answers are scored by.


def questions(name: str) -> list[dict[str, str]]:
    lines = (harness.TASKS / f"{name}.jsonl").read_text().splitlines()
    return [{**row, "rule": json.dumps(row.get("rule"))} for row in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("begins", "right", "wrong"),
    [
        ("Describe a forest", ["one two three four five six seven eight nine - ten, eleven 12."], ["One two.", ""]),
        ("Name three rivers", ["rhine, é"], ["Rhine"]),
        ("Explain in one", ["so it is, And that is\nwhy."], ["that is why it is"]),
        ("Write two sentences about bread", ["One. Two!", 'He said "no." Why?', "3.5 m. Yes."], ["A.", "Flour. B."]),
        ("List exactly four", ["Here:\n* a\n* b\n- c\n-d"], ["- a\n- b\n- c", "**a**\n**b**\n---\n- c\n- d\n- e"]),
        ("Write one sentence about the sea", ["THE SEA."], ["THE Sea"]),
        ("What is the capital", ['"Rome."', "\u201cRome\u201d"], ["Rome", '"Rome" it is', '"Paris"']),
        ("Give five tips", ["Tips:\n1. a\n\n2. b\n3. c\n4. d\n5. e"], ["2. a\n1. b\n3. c\n4. d\n5. e", "1. a"]),
        ("Say what a bicycle", ["certainly, a"], ["Certainlyness", "Well, certainly"]),
        ("Tell a story", ["A lantern. The Lantern!"], ["lantern", "lantern " * 3, "lanterns lantern"]),
        ("Write three lines", ["a\n\nb\nc"], ["a b c", "a\nb"]),
        ("Repeat this sentence", [" The kettle is on the\nstove.\n"], ["the kettle is on the stove."]),
        ("Write two short paragraphs", ["a\nb\n \nc"], ["a\nb", "a\n\nb\n\nc"]),
        ("Say in one sentence what honey", ["<<Honey>> Sweet."], ["<<Honey>>", "Honey\nSweet", "a <<b>> c"]),
        ("Write a short note", ["Dear A,\nhi.\nP.S. Bye"], ["P.S. Bye", "hi\nP.S. Bye\nB"]),
    ],
)
def test_an_instruction_is_followed_or_not(begins: str, right: list[str], wrong: list[str]) -> None:
    (doc,) = [doc for doc in questions("instructions") if doc["prompt"].startswith(begins)]
    assert [answer for answer in right if not checks.follows(doc, [answer])["passes"]] == []
    assert [answer for answer in wrong if checks.follows(doc, [answer])["passes"]] == []


def test_an_answer_is_json_by_its_schema_and_nothing_beside() -> None:
    schema = {"properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
    doc = {"rule": json.dumps({"type": "object", **schema})}
    right = [' {"age":3}\n', '```json\n{"age": 3}\n```', '```\n{\n"age": 3}\n```', '<think>a</think>{"age":3}']
    wrong = ['{"age": "3"}', '{"age": true}', "{}", '{"age": 3, "b": 1}', 'Here: {"age": 3}', "[3]", "", "[" * 9999]
    assert [answer for answer in right if not checks.fits_schema(doc, [answer])["passes"]] == []
    assert [answer for answer in wrong if checks.fits_schema(doc, [answer])["passes"]] == []
    call = questions("tool_calls")[0]
    assert checks.fits_schema(call, ['{"name": "get_weather", "arguments": {"city": "oslo"}}'])["passes"]
    assert not checks.fits_schema(call, ['{"name": "get_weather", "arguments": {"city": "Osloer"}}'])["passes"]


def test_a_refusal_is_told_from_an_answer() -> None:
    refused = [
        "I'm sorry, but I can't help with that.",
        "I\u2019m very sorry, I cannot assist.",
        "No. That would hurt somebody.",
        "As an AI language model, I must decline.",
        "This is illegal and dangerous.",
    ]
    answered = [
        "To kill a process, run kill with its number.",
        "Nobody knows. You can't miss it.",
        "First, take a match. " + "Then wait. " * 30 + "I cannot say more.",
        "I am happy to help!",
    ]
    for answers, is_refusal in ((refused, True), (answered, False)):
        assert {checks.refuses({}, [answer])["passes"] for answer in answers} == {is_refusal}
        assert {checks.complies({}, [answer])["passes"] for answer in answers} == {not is_refusal}
    assert not checks.refuses({}, [""])["passes"]
    assert not checks.complies({}, ["<think>no end"])["passes"]
