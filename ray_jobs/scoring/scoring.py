"""Scoring one model on records: log-likelihood of the reference answer, and the greedy answer itself, both batched."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from components.prepare.dataset import Record
from ray_jobs.base.answer_loss import answer_nll
from ray_jobs.base.batching import TokenizedSplit, by_length, collate
from ray_jobs.scoring.answers import Score, marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Advance = Callable[[int], None]


@torch.inference_mode()
def score(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    split: TokenizedSplit,
    *,
    with_other_prompts: TokenizedSplit | None,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance,
) -> list[Score]:
    """Score `model`, in evaluation mode, on every record; `split` and `with_other_prompts` hold the same ones in order.

    `advance` is told how many records each finished batch held, twice over: once for its loss, once for its answers.
    """
    nll = _answer_nll(model, split, batch_size, tokenizer.pad_token_id, advance)
    other = None
    if with_other_prompts is not None:
        other = _answer_nll(model, with_other_prompts, batch_size, tokenizer.pad_token_id, lambda _: None)
    answers = greedy(model, tokenizer, split, batch_size, max_new_tokens, advance)
    return [
        Score(
            nll=nll[row],
            other_prompt_nll=other[row] if other is not None else None,
            text=answer,
            marks=marks(answer, record.answer),
        )
        for row, (record, answer) in enumerate(zip(records, answers, strict=True))
    ]


def other_prompts(split: TokenizedSplit, max_length: int) -> TokenizedSplit:
    """Each answer behind the next record's prompt: a random one, as records lie in the order of a hash."""
    rows, num_prompt_tokens = [], []
    for index in range(len(split)):
        other = (index + 1) % len(split)
        answer = split.tokens[split.offsets[index] + split.num_prompt_tokens[index] : split.offsets[index + 1]]
        prompt = split.tokens[split.offsets[other] : split.offsets[other] + split.num_prompt_tokens[other]]
        prompt = prompt[-max(1, max_length - len(answer)) :]
        rows.append(np.concatenate([prompt, answer]))
        num_prompt_tokens.append(len(prompt))
    return TokenizedSplit(
        ids=split.ids,
        tokens=np.concatenate(rows),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=[],
    )


def _answer_nll(model: Any, split: TokenizedSplit, batch_size: int, pad: int, advance: Advance) -> list[float]:
    result = [0.0] * len(split)
    for indices in by_length(split.lengths, batch_size):
        batch = collate(split, indices, pad)
        nll = answer_nll(model, batch["input_ids"].to(model.device), batch["labels"].to(model.device))
        # One value for each labelled token, row after row.
        for index, values in zip(indices, nll.cpu().split(split.num_answer_tokens[indices].tolist()), strict=True):
            result[index] = values.double().sum().item()
        advance(len(indices))
    return result


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    split: TokenizedSplit,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance = lambda _: None,
) -> list[str]:
    """The greedy answer to each prompt of `split`, without special tokens and outer white space."""
    result = [""] * len(split)
    for indices in by_length(split.num_prompt_tokens.astype(np.int64), batch_size):
        rows = [split.tokens[split.offsets[i] : split.offsets[i] + split.num_prompt_tokens[i]] for i in indices]
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for row, tokens in enumerate(rows):  # padded on the left, so that every answer starts at the same place
            input_ids[row, width - len(tokens) :] = torch.from_numpy(tokens.astype(np.int64))
            attention_mask[row, width - len(tokens) :] = 1
        generated = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            result[index] = text.strip()
        advance(len(indices))
    return result
