"""Answers pieces word by word, against the answer that is given in the end."""

import pytest
import torch
from transformers import TextStreamer

from components.prepare.dataset import Message, Record
from ray_jobs.scoring.generation import _Words, greedy
from ray_jobs.text.batching import tokenize


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


@pytest.mark.parametrize("text", ["  one two \n three  ", "one", " ", "", "a  b", "\n\nx\n"])
def test_outer_white_space_is_never_passed_on(tiny, text):
    _, chat = tiny
    pieces: list[str] = []
    words = _Words(chat, pieces.append)
    assert isinstance(words, TextStreamer)
    words.put(torch.tensor([0]))  # the prompt
    for token in chat.tokenizer(text, add_special_tokens=False)["input_ids"]:
        words.put(torch.tensor([token]))
    words.end()
    assert "".join(pieces) == text.strip()
    assert all(pieces)
