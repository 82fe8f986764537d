"""Scoring one model on records: log-likelihood of the reference answer, and the greedy answer, both batched."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.prepare.dataset import Record
from ray_jobs.scoring.answers import MARKS, Mark, Score
from ray_jobs.scoring.generation import (
    Advance,
    Reader,
    answers_to,
    free_bytes,
    greedy,
    in_batches,
    is_shared,
    with_room,
)
from ray_jobs.text.answer_loss import records_nll
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.chat_format import ChatFormat, without_reasoning


@torch.inference_mode()
def score(
    model: Any,
    chat: ChatFormat,
    records: Sequence[Record],
    split: TokenizedSplit,
    *,
    with_other_prompts: TokenizedSplit | None,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance,
    marks: Mapping[str, Mark] = MARKS,
) -> list[Score]:
    """Score `model`, in evaluation mode, on every record; `split` and `with_other_prompts` hold them in order.

    `advance` receives the number of records of each finished batch twice: once for its loss, once for its answers.
    """
    nll: list[list[float]]
    if len(split) and Reader.takes(model):
        parts = [part for part in (split, with_other_prompts) if part is not None]
        nll, texts = _reading_once(model, chat, parts, batch_size, max_new_tokens, advance)
    else:
        nll = [label_nll(model, split, batch_size, chat.pad, advance)]
        if with_other_prompts is not None:
            nll.append(label_nll(model, with_other_prompts, batch_size, chat.pad))
        texts = greedy(model, chat, split, batch_size, max_new_tokens, advance)
    answers = [without_reasoning(text) for text in texts]
    references = [_reference(chat, record, split, row) for row, record in enumerate(records)]
    return [
        Score(
            nll=nll[0][row],
            other_prompt_nll=nll[1][row] if with_other_prompts is not None else None,
            text=answer,
            marks={key: mark(answer, reference) for key, mark in marks.items()},
        )
        for row, (reference, answer) in enumerate(zip(references, answers, strict=True))
    ]


def _reading_once(
    model: Any,
    chat: ChatFormat,
    parts: Sequence[TokenizedSplit],
    batch_size: int,
    max_new_tokens: int,
    advance: Advance,
) -> tuple[list[list[float]], list[str]]:
    """-log p of each part's answers, and the greedy answers to the first part's prompts; each prompt is read once."""
    of_key = {parts[0].prompt(row).tobytes(): parts[0].prompt(row) for row in range(len(parts[0]))}
    numbers, prompts = {key: number for number, key in enumerate(of_key)}, list(of_key.values())
    asked = [[numbers.get(part.prompt(row).tobytes()) for row in range(len(part))] for part in parts]
    reader = Reader(model, prompts, chat.pad)
    nll = [[0.0] * len(part) for part in parts]
    texts = [""] * len(parts[0])

    def measure(indices: npt.NDArray[np.int64]) -> None:
        these = [prompts[index] for index in indices]
        places: dict[int | None, int] = {int(index): place for place, index in enumerate(indices)}
        read = reader.read(these)
        for part, numbers_of, found in zip(parts, asked, nll, strict=True):
            rows = [row for row, number in enumerate(numbers_of) if number in places]
            for some in (rows[start : start + len(these)] for start in range(0, len(rows), len(these))):
                behind = read.take([places[numbers_of[row]] for row in some])
                for row, loss in zip(some, reader.nll(behind, [part.answer(row) for row in some]), strict=True):
                    found[row] = loss
        answers = answers_to(reader, read, these, chat, max_new_tokens)
        own = [row for row, number in enumerate(asked[0]) if number in places]
        for row in own:
            texts[row] = answers[places[asked[0][row]]]
        advance(2 * len(own))

    lengths = np.array([len(prompt) for prompt in prompts])
    # Doubled: losses are computed on a copy of the KV cache.
    longest = int(lengths.max()) + max(max_new_tokens, int(max(part.num_answer_tokens.max() for part in parts)))
    at_once = with_room(batch_size, model.config, 2 * longest, free_bytes(model.device))
    in_batches(lengths, at_once, measure)
    for part, numbers_of, found in zip(parts, asked, nll, strict=True):
        cut = [row for row, number in enumerate(numbers_of) if number is None]  # to fit another's answer
        for row, loss in zip(cut, label_nll(model, part.take(cut), batch_size, chat.pad), strict=True):
            found[row] = loss
    return nll, texts


def _reference(chat: ChatFormat, record: Record, split: TokenizedSplit, row: int) -> str:
    """The text that the answer is compared with; for tool calls, the text that the chat template writes for them."""
    if not record.calls:
        return without_reasoning(record.answer)
    return without_reasoning(chat.text_of(split.answer(row)))


def other_prompts(split: TokenizedSplit, max_length: int) -> TokenizedSplit:
    """Pair each answer with the next record's prompt: a random one, as records are in the order of a hash."""
    rows, labels, num_prompt_tokens = [], [], []
    for index in range(len(split)):
        answer = split.answer(index)
        prompt = split.prompt((index + 1) % len(split))[-max(1, max_length - len(answer)) :]
        rows.append(np.concatenate([prompt, answer]))
        labels.append(np.arange(len(prompt) + len(answer)) >= len(prompt))
        num_prompt_tokens.append(len(prompt))
    return TokenizedSplit(
        ids=split.ids,
        tokens=np.concatenate(rows),
        labelled=np.concatenate(labels),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=[],
        cut=[],
    )


@torch.inference_mode()
def label_nll(
    model: Any, split: TokenizedSplit, batch_size: int, pad: int, advance: Advance = lambda _: None
) -> list[float]:
    """-log p in nats of the labelled tokens in each row of `split`, given the tokens before them."""
    result = [0.0] * len(split)

    def measure(indices: npt.NDArray[np.int64]) -> None:
        nll = records_nll(model, split, indices, pad, device=model.device)
        # One value for each labelled token, row after row.
        for index, values in zip(indices, nll.cpu().split(split.num_answer_tokens[indices].tolist()), strict=True):
            result[index] = values.double().sum().item()
        advance(len(indices))

    in_batches(split.lengths, batch_size, measure, together=is_shared(model))
    return result
