"""Answers and their losses: in batches that fit, in the order of the records, and word by word."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from components.config.schema import ModelConfig
from components.prepare.dataset import Message, Record
from components.shared.errors import JobError
from ray_jobs.base import base_model
from ray_jobs.scoring.generation import (
    cache_bytes_per_token,
    greedy,
    in_batches,
    other_prompts,
    with_room,
)
from ray_jobs.text import chat_format
from ray_jobs.text.batching import TokenizedSplit, tokenize
from tests.models.shapes import LLAMA_2_7B, LLAMA_3_8B
from tests.models.splits import split_of
from tests.models.tiny_version import RECORDS


@pytest.fixture(scope="module")
def tiny(tiny_base):
    config = ModelConfig(base=str(tiny_base))
    base = base_model.resolve(config)
    return base_model.load_model(base, config, "bf16", use_gpu=False).eval(), chat_format.load(base, config)


def rows_of(split: TokenizedSplit) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each record."""
    rows = [split.tokens[start:end].tolist() for start, end in zip(split.offsets, split.offsets[1:], strict=False)]
    return [(row[:cut], row[cut:]) for row, cut in zip(rows, split.num_prompt_tokens, strict=True)]


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

    handle = model.get_output_embeddings().register_forward_hook(say)
    try:
        yield left
    finally:
        handle.remove()


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
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        answer = greedy(model, chat, split, 1, 40, on_text=lambda text: pieces.append((len(passes), text)))
    finally:
        handle.remove()
    assert answer == greedy(model, chat, split, 1, 40)
    assert "".join(text for _, text in pieces) == answer[0]
    assert len(pieces) > 1
    assert pieces[0][0] < len(passes)
