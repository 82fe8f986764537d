"""Batches that fit: planned from the size of keys and values, and halved where memory runs out all the same."""

import logging

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from components.prepare.dataset import Message, Record
from components.shared.errors import JobError
from ray_jobs.scoring.generation import cache_bytes_per_token, in_batches, score, with_room
from ray_jobs.text.batching import tokenize
from tests.models.shapes import LLAMA_2_7B, LLAMA_3_8B
from tests.models.tiny import colour_rows

LENGTHS = np.array([3, 9, 5, 7, 1, 8])
LONGEST_FIRST = [1, 5, 3, 2, 0, 4]


def test_without_trouble_records_go_in_batches_longest_first():
    seen: list[list[int]] = []
    in_batches(LENGTHS, 4, lambda indices: seen.append(indices.tolist()))
    assert seen == [LONGEST_FIRST[:4], LONGEST_FIRST[4:]]


def test_out_of_memory_halves_the_batches_from_there_on(caplog):
    tried, done = [], []

    def work(indices):
        tried.append(len(indices))
        if len(indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(indices.tolist())

    with caplog.at_level(logging.WARNING):
        in_batches(LENGTHS, 6, work)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert done == LONGEST_FIRST
    assert [record.message for record in caplog.records] == [
        "out of memory with 6 records at once: going on with 3",
        "out of memory with 3 records at once: going on with 1",
    ]


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


def test_scores_are_the_same_where_memory_held_fewer_records_at_once(tiny, monkeypatch):
    model, chat = tiny
    records = [Record(row["id"], [Message("user", row["prompt"])], row["completion"]) for row in colour_rows(8)]
    split = tokenize(records, chat, 64)

    def scored(batch_size):
        done = []
        found = score(
            model,
            chat,
            records,
            split,
            with_other_prompts=None,
            batch_size=batch_size,
            max_new_tokens=4,
            advance=done.append,
        )
        assert sum(done) == 2 * len(records)
        return found

    expected = scored(2)

    def fits(_, arguments, named):
        if named["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fits, with_kwargs=True)
    try:
        found = scored(8)
    finally:
        handle.remove()
    assert [(each.text, each.nll) for each in found] == [(each.text, each.nll) for each in expected]
