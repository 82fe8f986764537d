"""Questions outside the domain: how they are put, against plain transformers, and what is not asked twice."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.registry.versions import Version
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.probes import suites
from ray_jobs.probes.suites import Questions, prepare, shipped
from ray_jobs.scoring.measure import measure_shard
from ray_jobs.text import chat_format
from tests.models.chat_families import TOOLS
from tests.models.tiny import colour_rows
from tests.models.tiny_version import contenders, publish, remember

RECORDS = [Record(row["id"], [Message("user", row["prompt"])], row["completion"]) for row in colour_rows(2)]
FEW = 4  # items of each suite, for the time that they take


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {
        name: {**suite, "items": suite["items"][:FEW], "max_new_tokens": 6}
        for name, suite in suites.shipped.__wrapped__().items()
    }
    monkeypatch.setattr(suites, "shipped", lambda: short)


@pytest.fixture
def config(config: RunConfig, store: Store) -> RunConfig:
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    return changed(config, *place, 'evaluate.suites=["json", "refusal"]', "evaluate.general_passages=0")


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    return config_file.loads(config_file.dumps(config), overrides)


@pytest.fixture
def version(config: RunConfig, store: Store, tmp_path) -> Version:
    return publish(config, store, tmp_path, with_data=False)


def chat_of(config: RunConfig) -> chat_format.ChatFormat:
    return chat_format.load(base_model.resolve(config.model), config.model)


def asked(config: RunConfig, store: Store, *versions: Version) -> Questions:
    return prepare(store, chat_of(config), config, contenders(config, *versions))


def roles_of(questions: Questions) -> dict[str, set[str]]:
    return {each.known.name: set(each.roles) for each in questions.suites}


def asked_before(store: Store, config: RunConfig, version: Version, questions: Questions) -> None:
    """An evaluation in which base and candidate pass what only an earlier run can have found."""
    passes = {"base": [True] * FEW, "candidate": [False] * FEW}
    suites = tuple(each.known.model_copy(update={"passes": passes}) for each in questions.suites)
    remember(store, config, version, suites=suites)


def test_an_answer_is_what_transformers_generates_behind_the_chat_template(config, store, version) -> None:
    questions = asked(config, store, version)
    assert roles_of(questions) == {"json": {"base", "candidate"}, "refusal": {"base", "candidate"}}
    found = measure_shard(contenders(config, version), RECORDS, {"q": questions}, shard_index=0).shares[0]["q"]
    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    model = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32).eval()
    same = 0
    for name in ("json", "refusal"):
        for item, answer in zip(suites.shipped()[name]["items"], found["base"][name], strict=True):
            turns = [{"role": "user", "content": item["prompt"]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.inference_mode():
                out = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
            said = tokenizer.decode(out[0, ids.shape[1] :])
            same += said.removesuffix(tokenizer.eos_token).strip() == answer
    assert same >= 2 * FEW - 2  # in bfloat16 a near tie may go another way
    assert found["candidate"] != found["base"]


def test_shares_are_judged_in_the_order_of_the_whole(config, store, version) -> None:
    questions = asked(config, store, version)
    numbers = {
        name: [suite["items"][place]["prompt"] for place in range(FEW)] for name, suite in suites.shipped().items()
    }

    def said(role: str, index: int) -> dict[str, list[str]]:
        passing = {"json": '{"name": "Ana", "age": 31}', "refusal": "I cannot help."}
        rows = [*range(FEW)][index::2]
        # The candidate passes the first item alone, the base all that this answer passes.
        return {
            name: [text if role == "base" or row == 0 else "No idea" for row in rows] for name, text in passing.items()
        }

    shares = [{role: said(role, index) for role in ("base", "candidate")} for index in range(2)]
    outcome = questions.outcome(shares, chat_of(config))
    json, refusal = outcome.record
    assert json.passes == {"base": [True, False, False, False], "candidate": [True, False, False, False]}
    assert refusal.passes == {"base": [True] * FEW, "candidate": [True, False, False, False]}
    assert refusal.won_and_lost("base") == (0, 3)
    assert [(each.prompt, each.answer) for each in refusal.lost] == [
        (text, "No idea") for text in numbers["refusal"][1:]
    ]
    assert outcome.lines[1] == "suite refusal: of 4 items base 4, candidate 1"
    assert [len(each.split) for each in questions.at(lambda count: range(1, count, 3)).suites] == [1, 1]


def test_what_an_earlier_run_has_found_is_not_asked_again(config, store, version) -> None:
    champion = replace(version, run_id="earlier")
    asked_before(store, config, champion, asked(config, store, champion))
    candidate = replace(version, version="0" * 12, run_id="later")
    questions = asked(config, store, champion, candidate)
    assert roles_of(questions) == {"json": {"candidate"}, "refusal": {"candidate"}}
    assert questions.suites[0].known.passes == {"base": [True] * FEW, "champion": [False] * FEW}
    nothing_new = replace(questions, suites=tuple(replace(each, roles=frozenset()) for each in questions.suites))
    assert nothing_new.outcome([], chat_of(config)).record == tuple(each.known for each in questions.suites)

    everybody = {"base", "champion", "candidate"}
    more = changed(config, 'evaluate.suites=["json", "over_refusal"]')
    assert roles_of(asked(more, store, champion, candidate)) == {"json": {"candidate"}, "over_refusal": everybody}
    dense = changed(config, "method.base=nf4")
    assert roles_of(asked(dense, store, champion, candidate))["json"] == {"base", "candidate"}
    store.put(f"runs/{champion.run_id}/evaluation.json", b"{")
    assert roles_of(asked(config, store, champion, candidate))["json"] == everybody


@pytest.mark.parametrize("changes", ["items", "max_new_tokens", "version"])
def test_other_questions_answers_or_checks_are_asked_anew(config, store, version, changes, monkeypatch) -> None:
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    asked_before(store, config, champion, asked(config, store, champion))
    suite = suites.shipped()["refusal"]
    if changes == "items":
        suite["items"] = [{"prompt": "Another?"}, *suite["items"][1:]]
    elif changes == "max_new_tokens":
        suite["max_new_tokens"] += 1
    else:
        monkeypatch.setattr(suites, "VERSION", 2)
    assert roles_of(asked(config, store, champion, candidate))["refusal"] == {"base", "champion", "candidate"}


def test_who_stands_on_another_base_is_left_out(config, store, version) -> None:
    ours = contenders(config, version, replace(version, version="0" * 12))
    other = [ours[0], replace(ours[1], base_identity={"kind": "folder", "sha256": "0"}), ours[2]]
    assert roles_of(prepare(store, chat_of(config), config, other))["json"] == {"base", "candidate"}


def test_a_base_whose_template_takes_no_tools_is_not_asked_to_call_them(config, store, version) -> None:
    both = changed(config, 'evaluate.suites=["tool_calls", "json"]')
    tools, json = asked(both, store, version).suites
    assert (len(tools.split), tools.roles) == (0, frozenset())
    assert tools.known.summary == "suite tool_calls: left out, the base's chat template takes no tools"
    assert json.roles == {"base", "candidate"}

    chat = chat_of(both)
    chat.tokenizer.chat_template = TOOLS
    (tools, _) = prepare(store, chat, both, contenders(both, version)).suites
    # 512 positions hold no question beside the tools it offers, each byte being a token here.
    assert tools.known.left_out == "its questions and answers do not fit into the 512 positions of the base"


def test_the_tools_are_offered_as_the_template_offers_them(config, store, version, monkeypatch) -> None:
    monkeypatch.setattr(suites.base_model, "positions", lambda *_: 4096)
    both = changed(config, 'evaluate.suites=["tool_calls"]')
    chat = chat_of(both)
    chat.tokenizer.chat_template = TOOLS
    questions = prepare(store, chat, both, contenders(both, version))
    (tools,) = questions.suites
    item = suites.shipped()["tool_calls"]["items"][0]
    text = chat.tokenizer.decode(tools.split.prompt(0))
    assert all(f'"name": "{name}"' in text for name in item["tools"])
    assert text.endswith(f"{item['prompt']}<|im_end|>\n<|im_start|>assistant\n")
    right = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    said = {"tool_calls": [right] * FEW}
    (found,) = questions.outcome([{"base": said, "candidate": said}], chat).record
    assert found.passes["base"] == [True, False, False, False]


def test_no_suites_are_nothing_prepare(config, store, version) -> None:
    none = asked(changed(config, "evaluate.suites=[]"), store, version)
    assert none.suites == ()
    assert none.outcome([{"base": {}}], chat_of(config)).record == ()


def test_all_items_fit_into_a_small_models_context() -> None:
    assert all(len(item["prompt"]) < 300 for suite in shipped().values() for item in suite["items"])
