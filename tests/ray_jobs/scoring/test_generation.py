"""Answers and their losses: in batches that fit, in the order of the records, and word by word; and what is asked
behind prompts that were read once, against the same model reading each text anew.

The losses of these are those of `label_nll`, and the answers those of transformers' own `generate`.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from components.config.schema import ModelConfig
from components.prepare.dataset import Message, Record
from components.shared.errors import JobError
from ray_jobs.base import attention, base_model
from ray_jobs.scoring.generation import (
    Reader,
    cache_bytes_per_token,
    greedy,
    in_batches,
    other_prompts,
    score,
    with_room,
)
from ray_jobs.text import chat_format
from ray_jobs.text.batching import TokenizedSplit, tokenize
from tests.models import zoo
from tests.models.shapes import LLAMA_2_7B, LLAMA_3_8B
from tests.models.splits import split_of
from tests.models.tiny_version import RECORDS


def loaded(folder, dtype):
    config = ModelConfig(base=str(folder))
    base = base_model.resolve(config)
    model = base_model.load_model(base, config, "bf16", use_gpu=False).to(dtype).eval()
    return model, chat_format.load(base, config)


@pytest.fixture(scope="module")
def tiny(tiny_base):
    return loaded(tiny_base, torch.bfloat16)


def rows_of(split: TokenizedSplit) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each record."""
    return [(split.prompt(row).tolist(), split.answer(row).tolist()) for row in range(len(split))]


def test_each_answer_stands_behind_the_next_prompt_and_the_last_behind_the_first():
    split = split_of(([1, 2], [10]), ([3], [20, 21]), ([4, 5, 6], [30]))
    found = other_prompts(split, 64)
    assert rows_of(found) == [([3], [10]), ([4, 5, 6], [20, 21]), ([1, 2], [30])]
    assert found.ids == split.ids
    assert found.num_answer_tokens.tolist() == split.num_answer_tokens.tolist()


def test_a_prompt_that_does_not_fit_its_new_answer_loses_its_beginning():
    split = split_of(([1], [10, 11, 12, 13]), ([2, 3, 4, 5], [20]))
    assert rows_of(other_prompts(split, 6)) == [([4, 5], [10, 11, 12, 13]), ([1], [20])]
    assert rows_of(other_prompts(split, 4))[0] == ([5], [10, 11, 12, 13])  # and never all of it, nor of the answer


@contextmanager
def saying(model, chat, *tokens):
    """The model says these tokens to every prompt, and no others; gives those that it was not asked for."""
    left = chat.tokenizer.convert_tokens_to_ids(list(tokens))

    def say(_, inputs, logits):
        spoken = torch.full(logits.shape[:-1], left.pop(0))
        return torch.nn.functional.one_hot(spoken, logits.shape[-1]).to(logits.dtype)

    with model.get_output_embeddings().register_forward_hook(say):
        yield left


def test_an_answer_ends_at_the_end_of_its_turn_which_is_no_part_of_it(tiny):
    model, chat = tiny
    split = tokenize(RECORDS[:3], chat, 64)
    with saying(model, chat, "Ġ", "x", "Ġ", "<|end|>", "y", "y") as left:
        assert greedy(model, chat, split, 3, 6) == ["x", "x", "x"]
    assert left == [chat.tokenizer.convert_tokens_to_ids("y")] * 2


@pytest.mark.parametrize("reads_once", [True, False])
def test_an_answer_that_names_other_special_tokens_is_read_with_them(tiny, monkeypatch, reads_once):
    model, chat = tiny
    monkeypatch.setattr("ray_jobs.scoring.generation.Reader.takes", lambda model: reads_once)
    tagged = Record("0", [Message("user", "Ada")], "<|user|>x<|system|>  y")
    pieces: list[str] = []
    with saying(model, chat, "Ġ", "<|user|>", "x", "<|system|>", "Ġ", "Ġ", "y", "Ġ", "<|end|>"):
        (found,) = greedy(model, chat, tokenize([tagged], chat, 64), 1, 9, on_text=pieces.append)
    assert found == "".join(pieces) == tagged.answer  # without outer white space
    assert all(pieces)


LENGTHS = np.array([3, 9, 5, 7, 1, 8])
LONGEST_FIRST = [1, 5, 3, 2, 0, 4]


def test_out_of_memory_halves_the_batches_from_there_on():
    tried, done = [], []

    def work(indices):
        tried.append(len(indices))
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(indices.tolist())

    in_batches(LENGTHS, 6, work)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert done == LONGEST_FIRST


def test_one_record_that_does_not_fit_is_told_with_its_length():
    def work(indices):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(JobError, match=r"does not hold one record of 9 tokens .* model\.max_length"):
        in_batches(LENGTHS, 2, work)


def test_keys_and_values_are_counted_as_published():
    # arXiv:2309.06180 (vLLM), section 3: 800 KB for a token of OPT-13B: 2 x 5120 x 40 layers x 2 bytes.
    opt = LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40)
    assert cache_bytes_per_token(opt) == 800 * 1024
    assert cache_bytes_per_token(LLAMA_2_7B) == 512 * 1024
    assert cache_bytes_per_token(LLAMA_3_8B) == 128 * 1024  # 8 of 32 heads


def test_no_more_records_are_answered_at_once_than_their_keys_and_values_have_room_for():
    gib = 2**30
    # Llama-2-7B, 1,024 tokens and 256 new ones: 0.625 GiB a record.
    assert with_room(32, LLAMA_2_7B, 1280, 80 * gib) == 32
    assert with_room(32, LLAMA_2_7B, 1280, 10 * gib) == 11
    assert with_room(32, LLAMA_2_7B, 1280, gib // 4) == 1
    assert with_room(32, LLAMA_2_7B, 1280, None) == 32


def test_the_pieces_are_the_answer_and_the_first_comes_before_the_last_token(tiny):
    model, chat = tiny
    split = tokenize([Record("0", [Message("user", "sky")], "-")], chat, 64)
    passes, pieces = [], []
    with model.register_forward_hook(lambda *_: passes.append(1)):
        answer = greedy(model, chat, split, 1, 40, on_text=lambda text: pieces.append((len(passes), text)))
    assert answer == greedy(model, chat, split, 1, 40)
    assert "".join(text for _, text in pieces) == answer[0]
    assert len(pieces) > 1
    assert pieces[0][0] < len(passes)


IN_SHORT = ("Llama, tied", "Phi-3", "GPT-2", "OPT")
TAKEN = (
    *IN_SHORT, "Llama, untied", "Llama, biased", "Ministral 3", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "SmolLM3",
    "OLMo 2", "Granite", "GLM-4", "StarCoder2",
)  # fmt: skip
"""Models of the zoo without windows, chunks, recurrent states or towers, and with a choice of kernels."""
RULE = Message("system", "Answer with one word.")
ASKED = [
    Record(str(index), [RULE, Message("user", prompt)], answer)
    for index, (prompt, answer) in enumerate(
        [("sky", "blue"), ("a longer one, about grass", "green"), ("sky", "azure"), ("coal", "b"), ("", "white")]
    )
]


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """An architecture of the zoo, in float32."""
    return lambda name: loaded(zoo.build(name, tmp_path_factory.mktemp("base")), torch.float32)


def scored(model, chat, *, batch_size: int = 2, longest: int = 48):
    split = tokenize(ASKED, chat, 96)
    others = other_prompts(split, longest)  # by default the longest prompt loses its beginning
    return score(model, chat, ASKED, split, others, batch_size=batch_size, max_new_tokens=12)


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
def test_losses_and_answers_are_those_of_reading_each_text_anew(name, loads, monkeypatch):
    model, chat = loads(name)
    assert Reader.takes(model)
    found, expected = scored(model, chat), anew(model, chat, monkeypatch)
    assert [each.text for each in found] == [each.text for each in expected]
    for key in ("nll", "other_prompt_nll"):
        ours, theirs = ([getattr(each, key) for each in scores] for scores in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({round(each.nll, 2) for each in found}) == len(ASKED)


def test_what_all_begin_with_is_read_once_and_each_prompt_once_more(loads):
    model, chat = loads("Llama, tied")
    split = tokenize(ASKED, chat, 96)
    num_read, embeddings = [], model.get_input_embeddings()
    with embeddings.register_forward_hook(lambda _, inputs, __: num_read.append(inputs[0].shape)):
        scored(model, chat, batch_size=8, longest=96)
    beginning, remainders = num_read[:2]
    prompts = {split.prompt(row).tobytes(): split.prompt(row) for row in range(len(split))}
    shortest = min(map(len, prompts.values()))
    assert beginning[0] == 1
    assert len("<|system|>Answer with one word.") - len("<|system|>") < beginning[1] < shortest
    assert remainders[1] == max(map(len, prompts.values())) - 1 - beginning[1]
    assert all(width <= split.num_answer_tokens.max() for _, width in num_read[2:])


def test_whoever_has_ended_leaves_the_batch(loads):
    model, chat = loads("Llama, tied")
    split = tokenize(ASKED, chat, 96)
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
