"""What is asked behind prompts that were read once, against the same model reading each text anew.

The losses are those of `label_nll`, and the answers those of transformers' own `generate`.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from components.config.schema import ModelConfig
from components.prepare.dataset import Message, Record
from ray_jobs.base import attention, base_model
from ray_jobs.scoring.generation import Reader, other_prompts, score
from ray_jobs.text import chat_format
from ray_jobs.text.batching import tokenize
from tests.models import zoo

IN_SHORT = ("Llama, tied", "Phi-3", "GPT-2", "OPT")
TAKEN = (
    *IN_SHORT, "Llama, untied", "Llama, biased", "Ministral 3", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "SmolLM3",
    "OLMo 2", "Granite", "GLM-4", "StarCoder2",
)  # fmt: skip
"""Models of the zoo without windows, chunks, recurrent states or towers, and with a choice of kernels."""
RULE = Message("system", "Answer with one word.")
RECORDS = [
    Record(str(index), [RULE, Message("user", prompt)], answer)
    for index, (prompt, answer) in enumerate(
        [("sky", "blue"), ("a longer one, about grass", "green"), ("sky", "azure"), ("coal", "b"), ("", "white")]
    )
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    def load(name: str, dtype: torch.dtype):
        config = ModelConfig(base=str(zoo.build(name, tmp_path_factory.mktemp("base"))))
        base = base_model.resolve(config)
        model = base_model.load_model(base, config, "bf16", use_gpu=False).to(dtype).eval()
        return model, chat_format.load(base, config)

    return load


def scored(model, chat, *, batch_size: int = 2, longest: int = 48):
    split = tokenize(RECORDS, chat, 96)
    others = other_prompts(split, longest)  # by default the longest prompt loses its beginning
    return score(model, chat, RECORDS, split, others, batch_size=batch_size, max_new_tokens=12)


def anew(model, chat, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Reader, "takes", staticmethod(lambda _: False))
        return scored(model, chat)


@pytest.mark.parametrize("name", zoo.KINDS)
def test_a_model_is_taken_that_keeps_the_keys_and_values_of_every_token_and_nothing_else(name):
    config = zoo.KINDS[name].config()
    config._attn_implementation = attention.choose(config, "auto", use_gpu=False)
    model = SimpleNamespace(config=config, parameters=lambda: [])
    assert Reader.takes(model) == (name in TAKEN)
    model.parameters = lambda: [SimpleNamespace(ds_id=0)]
    assert not Reader.takes(model)  # ZeRO-3 shards it: each pass is everybody's


def test_positions_that_depend_on_how_long_the_text_gets_are_not_taken():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(num_hidden_layers=1, rope_parameters=scaled)
    config._attn_implementation = "sdpa"
    assert not Reader.takes(SimpleNamespace(config=config, parameters=lambda: []))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_SHORT else [pytest.mark.slow]) for name in TAKEN]
)
def test_losses_and_answers_are_those_of_reading_each_text_anew(name, loaded, monkeypatch):
    model, chat = loaded(name, torch.float32)
    assert Reader.takes(model)
    found, expected = scored(model, chat), anew(model, chat, monkeypatch)
    assert [each.text for each in found] == [each.text for each in expected]
    for key in ("nll", "other_prompt_nll"):
        ours, theirs = ([getattr(each, key) for each in scores] for scores in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({round(each.nll, 2) for each in found}) == len(RECORDS)


def test_what_all_begin_with_is_read_once_and_each_prompt_once_more(loaded):
    model, chat = loaded("Llama, tied", torch.float32)
    split = tokenize(RECORDS, chat, 96)
    num_read = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: num_read.append(inputs[0].shape))
    try:
        scored(model, chat, batch_size=8, longest=96)
    finally:
        handle.remove()
    beginning, remainders = num_read[:2]
    prompts = {split.prompt(row).tobytes(): split.prompt(row) for row in range(len(split))}
    shortest = min(map(len, prompts.values()))
    assert beginning[0] == 1
    assert len("<|system|>Answer with one word.") - len("<|system|>") < beginning[1] < shortest
    assert remainders[1] == max(map(len, prompts.values())) - 1 - beginning[1]
    assert all(width <= split.num_answer_tokens.max() for _, width in num_read[2:])


def test_whoever_has_ended_leaves_the_batch(loaded):
    model, chat = loaded("Llama, tied", torch.float32)
    split = tokenize(RECORDS, chat, 96)
    prompts = [split.prompt(row) for row in range(len(split))]
    with torch.inference_mode():
        reader = Reader(model, prompts, chat.pad)
        alone = [reader.greedy(reader.read([prompt]), set(), [9], lambda _: None)[0] for prompt in prompts]
        stops = {alone[0][2]}  # the first ends after three tokens at most
        most = [9, 1, 9, 4, 9]
        together: list[int] = []
        found = reader.greedy(reader.read(prompts), stops, most, lambda tokens: together.append(len(tokens)))

    def until_stop(tokens, most):
        ended = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
        return tokens[: min(ended, most)]

    assert found == [until_stop(tokens, limit) for tokens, limit in zip(alone, most, strict=True)]
    assert together == [sum(len(tokens) > place for tokens in found) for place in range(max(map(len, found)))]
