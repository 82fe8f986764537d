"""The KL divergence from the base, against numpy's sum over all answers of two tokens that the tiny model may give."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from components.config import config_file
from components.config.schema import RunConfig
from components.gate.comparisons import Evidence, of_texts
from components.records.steps import Evaluation, TextLosses
from components.registry.versions import Version
from components.shared.metrics import METRICS
from components.shared.paired import bounds
from components.store.store import Store
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.probes import texts
from ray_jobs.probes.texts import OwnAnswers, prepare_own_answers, undrawn
from ray_jobs.scoring.generation import label_nll
from ray_jobs.scoring.measure import Outcome, measure_shard
from ray_jobs.text import chat_format
from ray_jobs.text.batching import as_split
from tests.models.spec import changed
from tests.models.tiny_version import RECORDS, contenders, randomise, remember
from tests.ray_jobs.conftest import CONFIG

SHIPPED = json.loads(resources.files("ray_jobs.probes").joinpath("own_answers.json").read_text(encoding="utf-8"))
MANY = 3000


@pytest.fixture
def config(placed: Callable[..., RunConfig]) -> RunConfig:
    return placed("evaluate.own_answers=5", "evaluate.general_passages=0")


@pytest.fixture(scope="module")
def base_and_model(tiny_base):
    """The tiny base and an adapter on it that has moved, in float32."""
    config = config_file.loads(CONFIG.format(base=tiny_base), ["method.rank=4"])
    base = base_model.resolve(config.model)

    def load():
        return base_model.load_model(base, config.model, "bf16", use_gpu=False).float().eval()

    adapted = build.attach(load(), config.method, base_reference="tiny", seed=0).float()
    randomise(adapted, std=0.06)
    return load(), adapted.eval(), chat_format.load(base, config.model)


def of_one_prompt(chat, count: int):
    """The same prompt many times, each with its own chances."""
    prompt = chat.tokenizer("<|user|>sky<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
    return as_split([prompt] * count, [len(prompt)] * count)


@torch.inference_mode()
def next_token(model, *rows: list[int]) -> np.ndarray:
    """Log-probabilities of the next token after each row, as transformers and scipy compute them."""
    return log_softmax(model(torch.tensor(rows)).logits[:, -1].double().numpy(), axis=-1)


def exactly(base, model, prompt: list[int], stops) -> tuple[float, float]:
    """KL(base || model) over all answers of at most two tokens, and the mean length of the base's."""
    before, after = (next_token(each, prompt)[0] for each in (base, model))
    second = [[*prompt, token] for token in range(len(before))]
    longer = np.array([token not in stops for token in range(len(before))])
    theirs, ours = (next_token(each, *second) for each in (base, model))
    of_second = (np.exp(theirs) * (theirs - ours)).sum(-1)
    reached = np.exp(before) * longer
    return float((np.exp(before) * (before - after)).sum() + (reached * of_second).sum()), 1 + float(reached.sum())


def test_the_estimate_is_the_divergence_over_the_whole_vocabulary(base_and_model) -> None:
    base, model, chat = base_and_model
    prompts = of_one_prompt(chat, MANY)
    divergence, length = exactly(base, model, prompts.prompt(0).tolist(), chat.stops)
    known = TextLosses(text_sha256="", tokens=[], nll={}, asked_sha256="0")
    asked = OwnAnswers(prompts, frozenset({"base", "candidate"}), known, new_tokens=2)
    answers = texts.sample(base, chat, prompts, 1000, 2)
    expected = np.exp(next_token(base, prompts.prompt(0).tolist())[0])
    first = np.bincount([answer[0] for answer in answers], minlength=len(expected)) / MANY
    assert abs((first - expected).cumsum()).max() < 1.95 / MANY**0.5  # Kolmogorov and Smirnov's bound at 0.1 %
    answered = asked.answered(answers)
    nll = {
        role: label_nll(each, answered.split, 1000, chat.pad) for role, each in (("base", base), ("candidate", model))
    }
    losses = answered.losses.model_copy(update={"nll": nll})
    assert losses.above_base("base") == 0
    found = losses.above_base("candidate")
    evaluation = Evaluation(run_id="r", records=1, models={}, own_answers=losses)
    evidence = Evidence(np.ones(1), {}, texts=dict(of_texts(evaluation)))
    between = bounds(evidence.pairs(METRICS["kl_from_base"], "base"), 0.95)
    assert -between.gain == pytest.approx(found)
    # Within three of the standard errors that the gate allows for, which are small beside the divergence itself.
    assert between.error < 0.05 * divergence / length
    assert abs(found - divergence / length) < 3 * between.error


def test_nothing_of_a_base_or_a_config_but_the_seed_decides_what_is_drawn(base_and_model) -> None:
    base, _, chat = base_and_model
    prompts = of_one_prompt(chat, 12)
    whole = texts.sample(base, chat, prompts, 12, 16)
    parts = [texts.sample(base, chat, prompts.take(range(start, 12, 3)), 2, 16) for start in range(3)]
    assert [parts[row % 3][row // 3] for row in range(12)] == whole
    assert len({tuple(answer) for answer in whole}) == 12
    assert base.generation_config is not None
    ended = [answer for answer in whole if answer[-1] in chat.stops]
    assert all(len(answer) == 16 for answer in whole if answer not in ended)
    assert not any(token in chat.stops for answer in whole for token in answer[:-1])


def chat_of(config: RunConfig) -> chat_format.ChatFormat:
    return chat_format.load(base_model.resolve(config.model), config.model)


def asked(config: RunConfig, store: Store, *versions: Version) -> OwnAnswers:
    return prepare_own_answers(store, chat_of(config), config, contenders(config, *versions))


def measured(config: RunConfig, version: Version, to_measure: OwnAnswers) -> Outcome:
    (share,) = measure_shard(contenders(config, version), RECORDS[:1], {"own": to_measure}, shard_index=1).shares
    return to_measure.outcome([share["own"]], None)


def test_the_base_is_asked_once_and_later_runs_take_its_answers_from_the_record(
    config, store, version, monkeypatch
) -> None:
    first = asked(config, store, version)
    assert first.roles == {"base", "candidate"}
    outcome = measured(config, version, first)
    losses = outcome.record
    assert [len(answer) for answer in losses.answers] == losses.tokens
    expected = (sum(losses.nll["candidate"]) - sum(losses.nll["base"])) / sum(losses.tokens)
    assert expected > 0.5  # an update drawn at random is far from it
    assert outcome.metrics["base"]["kl_from_base"] == 0
    assert outcome.metrics["candidate"]["kl_from_base"] == pytest.approx(expected)

    monkeypatch.setattr(texts, "sample", None)
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    remember(store, config, champion, own_answers=losses)
    later = asked(config, store, champion, candidate)
    assert later.roles == {"candidate"}
    assert later.losses.nll == {"base": losses.nll["base"], "champion": losses.nll["candidate"]}
    again = replace(later, roles=frozenset({"base", "candidate"}))  # read anew, it is the same answers
    read = measured(config, version, again).record
    assert (read.answers, read.text_sha256, read.tokens) == (losses.answers, losses.text_sha256, losses.tokens)
    for role in ("base", "candidate"):
        assert read.nll[role] == pytest.approx(losses.nll[role], rel=1e-3)


@pytest.mark.parametrize("change", ["evaluate.own_answers=4", "method.base=nf4", "model.max_length=40", ""])
def test_answers_to_other_prompts_or_of_another_base_are_drawn_anew(config, store, version, change) -> None:
    champion, candidate = replace(version, run_id="earlier"), replace(version, version="0" * 12, run_id="later")
    first = asked(config, store, champion)
    answered = first.answered([[1, 2, 3]] * 5).losses
    losses = answered.model_copy(update={"nll": {"base": [1.0] * 5, "candidate": [2.0] * 5}})
    remember(store, config, champion, own_answers=losses)
    assert asked(config, store, champion, candidate).new_tokens == 0
    if change:
        models = contenders(changed(config, change), champion, candidate)
    else:
        other_base = {"kind": "folder", "sha256": "0"}
        models = [replace(model, base_identity=other_base) for model in contenders(config, champion)]
    anew = prepare_own_answers(store, chat_of(config), models[0].config, models)
    assert anew.new_tokens > 0
    assert anew.losses.answers is None
    assert "base" in anew.roles
    assert not anew.losses.nll


def test_a_prompt_is_told_in_the_chat_template_and_leaves_room_for_an_answer(config) -> None:
    chat = chat_of(config)
    roomy = undrawn(chat, changed(config, "model.max_length=512"))
    assert roomy.new_tokens == 64
    dialogue = SHIPPED["prompts"][4]["turns"]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(dialogue)]
    expected = chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert roomy.split.prompt(4).tolist() == expected
    tight = undrawn(chat, config)
    assert tight.split.num_prompt_tokens.max() + tight.new_tokens <= config.model.max_length
