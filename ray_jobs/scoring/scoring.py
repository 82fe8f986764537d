"""Scoring one model on records: log-likelihood of the reference answer, and the greedy answer itself, both batched."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.prepare.dataset import Record
from ray_jobs.base.answer_loss import answer_nll
from ray_jobs.base.batching import TokenizedSplit, collate
from ray_jobs.base.chat_format import ChatFormat, without_reasoning
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.batches import in_batches, is_shared
from ray_jobs.scoring.generation import Advance, greedy
from ray_jobs.scoring.marks import MARKS, Mark


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
    """Score `model`, in evaluation mode, on every record; `split` and `with_other_prompts` hold the same ones in order.

    `advance` is told how many records each finished batch held, twice over: once for its loss, once for its answers.
    """
    nll = label_nll(model, split, batch_size, chat.pad, advance)
    other = None
    if with_other_prompts is not None:
        other = label_nll(model, with_other_prompts, batch_size, chat.pad)
    answers = [without_reasoning(text) for text in greedy(model, chat, split, batch_size, max_new_tokens, advance)]
    references = [_reference(chat, record, split, row) for row, record in enumerate(records)]
    return [
        Score(
            nll=nll[row],
            other_prompt_nll=other[row] if other is not None else None,
            text=answer,
            marks={key: mark(answer, reference) for key, mark in marks.items()},
        )
        for row, (reference, answer) in enumerate(zip(references, answers, strict=True))
    ]


def _reference(chat: ChatFormat, record: Record, split: TokenizedSplit, row: int) -> str:
    """The text that the answer is compared with; of tool calls, what the chat template writes for them."""
    if not record.calls:
        return without_reasoning(record.answer)
    answer = split.tokens[split.offsets[row] + split.num_prompt_tokens[row] : split.offsets[row + 1]]
    text: str = chat.tokenizer.decode(answer, skip_special_tokens=True)
    return without_reasoning(text.strip())


def other_prompts(split: TokenizedSplit, max_length: int) -> TokenizedSplit:
    """Each answer behind the next record's prompt: a random one, as records lie in the order of a hash."""
    rows, labels, num_prompt_tokens = [], [], []
    for index in range(len(split)):
        other = (index + 1) % len(split)
        answer = split.tokens[split.offsets[index] + split.num_prompt_tokens[index] : split.offsets[index + 1]]
        prompt = split.tokens[split.offsets[other] : split.offsets[other] + split.num_prompt_tokens[other]]
        prompt = prompt[-max(1, max_length - len(answer)) :]
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
    """-log p in nats of what is labelled in each row of `split`, given what stands before it."""
    result = [0.0] * len(split)

    def measure(indices: npt.NDArray[np.int64]) -> None:
        batch = collate(split, indices, pad)
        nll = answer_nll(model, batch["input_ids"].to(model.device), batch["labels"].to(model.device))
        # One value for each labelled token, row after row.
        for index, values in zip(indices, nll.cpu().split(split.num_answer_tokens[indices].tolist()), strict=True):
            result[index] = values.double().sum().item()
        advance(len(indices))

    in_batches(split.lengths, batch_size, measure, together=is_shared(model))
    return result
