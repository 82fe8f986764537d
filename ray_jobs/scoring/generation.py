"""Generation of answers: batched greedy decoding, the same for evaluation and chat, and sampling for chat."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import TextStreamer

from ray_jobs.base import base_config
from ray_jobs.scoring.batches import agreed, free_bytes, in_batches, is_shared, with_room
from ray_jobs.scoring.reading import Read, Reader, Tokens
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.chat_format import ChatFormat

Advance = Callable[[int], None]
OnText = Callable[[str], None]
OnToken = Callable[[int], None]


@torch.inference_mode()
def greedy(
    model: Any,
    chat: ChatFormat,
    split: TokenizedSplit,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance = lambda _: None,
    on_text: OnText | None = None,
    on_token: OnToken = lambda _: None,
) -> list[str]:
    """The greedy answer to each prompt of `split`, without its stop token and surrounding white space.

    An answer ends at a stop token, after `max_new_tokens`, or where the base has no more positions. At most
    `batch_size` prompts are answered at once, and fewer where their KV cache would not fit. For a single prompt,
    `on_text` receives the answer word by word as it is generated: the joined pieces are the answer. `on_token` then
    receives its tokens, including the stop token.
    """
    result = [""] * len(split)
    prompts = [split.prompt(row) for row in range(len(split))]
    reader = Reader(model, prompts, chat.pad) if prompts and Reader.takes(model) else None

    def answer(indices: npt.NDArray[np.int64]) -> None:
        batch = [prompts[index] for index in indices]
        words = None if on_text is None else _Words(chat, on_text, on_token)
        if reader is None:
            found = _texts(chat, generated(model, chat, batch, max_new_tokens, streamer=words))
        else:
            found = answers_to(reader, reader.read(batch), batch, chat, max_new_tokens, words)
        for index, text in zip(indices, found, strict=True):
            result[index] = text
        advance(len(indices))

    answer_all(model, chat, split, batch_size, max_new_tokens, answer)
    return result


@torch.inference_mode()
def sampled(
    model: Any,
    chat: ChatFormat,
    split: TokenizedSplit,
    max_new_tokens: int,
    temperature: float,
    *,
    on_text: OnText,
    on_token: OnToken,
) -> str:
    """Sample an answer to the single prompt of `split` from all tokens at `temperature`, which is above 0."""
    with _decoding(model, chat):
        tokens = generated(
            model,
            chat,
            [split.prompt(0)],
            max_new_tokens,
            streamer=_Words(chat, on_text, on_token),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
        )
    return _texts(chat, tokens)[0]


def answer_all(
    model: Any,
    chat: ChatFormat,
    split: TokenizedSplit,
    batch_size: int,
    max_new_tokens: int,
    answer: Callable[[npt.NDArray[np.int64]], None],
) -> None:
    """Call `answer` with the indices of all prompts, in batches as large as `batch_size` and memory allow."""
    together = is_shared(model)
    lengths = split.num_prompt_tokens.astype(np.int64)
    longest = int(lengths.max(initial=1)) + max_new_tokens
    at_once = with_room(batch_size, model.config, longest, free_bytes(model.device))
    with _decoding(model, chat):
        in_batches(lengths, agreed(at_once, model.device) if together else at_once, answer, together=together)


def answers_to(
    reader: Reader,
    read: Read,
    prompts: Sequence[Tokens],
    chat: ChatFormat,
    max_new_tokens: int,
    words: "_Words | None" = None,
) -> list[str]:
    """The greedy answers to prompts that a `Reader` has read."""
    reach = base_config.positions(reader.model.config)
    most = [_most(max_new_tokens, reach, len(prompt)) for prompt in prompts]
    if words is not None:
        words.put(torch.zeros(1))  # TextStreamer skips the first value, which it takes for the prompt
    found = reader.greedy(read, chat.stops, most, put=words.put if words is not None else lambda _: None)
    if words is not None:
        words.end()
    return _texts(chat, found)


def generated(model: Any, chat: ChatFormat, prompts: Sequence[Tokens], max_new_tokens: int, **given: Any) -> Any:
    """The new tokens after each prompt, from transformers' own `generate`; padding follows a stop token.

    Call it within `answer_all`. `given` is passed to `generate`.
    """
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), chat.pad, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, tokens in enumerate(prompts):  # padded on the left, so that every answer starts at the same place
        input_ids[row, width - len(tokens) :] = torch.from_numpy(tokens.astype(np.int64))
        attention_mask[row, width - len(tokens) :] = 1
    answers = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        max_new_tokens=_most(max_new_tokens, base_config.positions(model.config), width),
        synced_gpus=is_shared(model),
        **given,
    )
    return answers[:, width:]


def _most(max_new_tokens: int, reach: int | None, num_prompt_tokens: int) -> int:
    return max_new_tokens if reach is None else max(1, min(max_new_tokens, reach - num_prompt_tokens))


def _texts(chat: ChatFormat, answers: Any) -> list[str]:
    rows = answers.tolist() if isinstance(answers, torch.Tensor) else answers
    return [chat.text_of(tokens) for tokens in rows]


@contextmanager
def _decoding(model: Any, chat: ChatFormat) -> Iterator[None]:
    """Replace the model's generation config by the chat format's.

    `generate` takes what its own argument leaves open from the model's generation config (transformers 5.24,
    generation/utils.py, `_prepare_generation_config`), where a base may ship penalties and banned tokens.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = owner.generation_config
    owner.generation_config = chat.generation_config()
    try:
        yield
    finally:
        owner.generation_config = before


class _Words(TextStreamer):
    """Streams an answer as transformers' streamer completes its words, without surrounding white space."""

    def __init__(self, chat: ChatFormat, on_text: OnText, on_token: OnToken = lambda _: None) -> None:
        super().__init__(chat.tokenizer, skip_prompt=True)
        self._on_text, self._on_token, self._ends = on_text, on_token, chat.ends
        self._space: str | None = None  # white space, passed on if more follows; None before the first word

    def put(self, value: torch.Tensor) -> None:
        """Receive each token from `generate`; the prompt comes first."""
        if not self.next_tokens_are_prompt:
            self._on_token(int(value))
        if self.next_tokens_are_prompt or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive each completed piece of text."""
        if self._space is None:
            text = text.lstrip()
        words = text.rstrip()
        if not words:
            self._space = None if self._space is None else self._space + text
            return
        self._on_text((self._space or "") + words)
        self._space = text[len(words) :]
