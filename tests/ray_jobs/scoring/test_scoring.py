from contextlib import contextmanager

import numpy as np
import pytest
import torch

from components.prepare.dataset import Message, Record
from ray_jobs.scoring.generation import greedy, other_prompts, score
from ray_jobs.text.batching import TokenizedSplit, tokenize

RECORDS = [
    Record(str(i), [Message("user", prompt)], answer)
    for i, (prompt, answer) in enumerate([("sky", "blue"), ("a longer one about grass", "green"), ("coal", "black")])
]


def split_of(*records: tuple[list[int], list[int]]) -> TokenizedSplit:
    rows = [prompt + answer for prompt, answer in records]
    return TokenizedSplit(
        ids=[str(i) for i in range(len(rows))],
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        labelled=np.concatenate([np.repeat([False, True], [len(prompt), len(answer)]) for prompt, answer in records]),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        num_prompt_tokens=np.array([len(prompt) for prompt, _ in records], dtype=np.int32),
        too_long=[],
        cut=[],
    )


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


def test_an_answer_is_never_cut_and_keeps_a_token_before_it():
    split = split_of(([1], [10, 11, 12]), ([2, 3], [20]))
    assert rows_of(other_prompts(split, 3))[0] == ([3], [10, 11, 12])


def test_scores_come_in_the_order_of_the_records_whatever_the_batch(tiny):
    model, chat = tiny
    split = tokenize(RECORDS, chat, 64)
    done = []

    def scored(batch_size):
        done.clear()
        return score(
            model,
            chat,
            RECORDS,
            split,
            with_other_prompts=None,
            batch_size=batch_size,
            max_new_tokens=4,
            advance=done.append,
        )

    one, all_at_once = scored(1), scored(3)
    assert sum(done) == 2 * len(RECORDS)
    assert [s.nll for s in one] == pytest.approx([s.nll for s in all_at_once], abs=0.1)  # bfloat16
    assert len({round(s.nll, 1) for s in one}) == len(RECORDS)
    assert all(s.other_prompt_nll is None for s in one)


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
    split = tokenize(RECORDS, chat, 64)
    with saying(model, chat, "Ġ", "x", "Ġ", "<|end|>", "y", "y") as left:
        assert greedy(model, chat, split, 3, 6) == ["x", "x", "x"]
    assert left == [chat.tokenizer.convert_tokens_to_ids("y")] * 2


@pytest.mark.parametrize("reads_once", [True, False])
def test_an_answer_that_names_other_special_tokens_is_read_with_them(tiny, monkeypatch, reads_once):
    model, chat = tiny
    monkeypatch.setattr("ray_jobs.scoring.generation.Reader.takes", lambda model: reads_once)
    tagged = Record("0", [Message("user", "Ada")], "<|user|>x<|system|>")
    pieces: list[str] = []
    with saying(model, chat, "<|user|>", "x", "<|system|>", "<|end|>"):
        (found,) = greedy(model, chat, tokenize([tagged], chat, 64), 1, 6, on_text=pieces.append)
    assert found == "".join(pieces) == tagged.answer
