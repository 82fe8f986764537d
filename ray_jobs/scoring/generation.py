"""Generation of answers: batched greedy decoding, the same for evaluation and chat, and sampling for chat; and the
scores of a model that answers records."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from operator import ne
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import DynamicCache, TextStreamer

from components.prepare.dataset import Record
from components.shared.errors import JobError
from components.shared.machine import replaced
from ray_jobs.base import base_model
from ray_jobs.base.attention import FLOAT32, RECORDS, looks_at_all_before
from ray_jobs.scoring.answers import MARKS, Mark, Score
from ray_jobs.text.answer_loss import is_shared, next_token_nll, records_nll
from ray_jobs.text.batching import IGNORED, TokenizedSplit, as_split, common_beginning
from ray_jobs.text.chat_format import ChatFormat, without_reasoning

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Each prompt is read once (prefill), both for the losses of answers and for greedy decoding, and a prefix that all
# prompts share once in all. This needs a model that caches keys and values of every token and nothing else: no sliding
# windows, chunks or recurrent states.
#
# Shapes: B prompts, T positions in the cache of each, S tokens that are read at once.

ATTENTION = (FLOAT32, RECORDS, "sdpa", "eager")
"""Attention kernels that accept a mask with padding in the middle."""

Tokens = npt.NDArray[np.int32]
Put = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Read:
    """The KV cache of prompts that have been read except for their last tokens."""

    cache: DynamicCache
    is_token_BT: torch.Tensor
    """0 for padding: placed before a shorter prompt's own tokens, so that all prompts continue at the same position."""
    last_B: torch.Tensor
    """The last token of each prompt, which is still to be read."""

    def take(self, rows: Sequence[int]) -> "Read":
        """The prompts at `rows`, in that order; a row may be repeated."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.last_B.device)
        cache = _to_grow(self.cache)
        cache.batch_select_indices(chosen)
        return Read(cache, self.is_token_BT[chosen], self.last_B[chosen])


class Reader:
    """A model in evaluation mode, with the common prefix of all prompts in its KV cache."""

    @staticmethod
    def takes(model: Any) -> bool:
        """Whether this model can continue from a KV cache in this way."""
        base = model.config
        return not is_shared(model) and base._attn_implementation in ATTENTION and looks_at_all_before(base)

    def __init__(self, model: Any, prompts: Sequence[Tokens], pad: int) -> None:
        self.model, self._pad = model, pad
        self._body = getattr(model, "get_base_model", lambda: model)().get_decoder()  # the decoder: no logits needed
        self._num_common = common_beginning(prompts, min(map(len, prompts)) - 1)  # each prompt's last token is left out
        nothing = torch.zeros(1, 0, dtype=torch.long, device=model.device)
        begun = Read(DynamicCache(config=model.config), nothing, nothing.new_zeros(1))
        self._begun = self._read(begun, [prompts[0][: self._num_common]])

    def read(self, prompts: Sequence[Tokens]) -> Read:
        """Read some of the prompts, except for their last tokens."""
        last_B = torch.tensor([int(prompt[-1]) for prompt in prompts], device=self.model.device)
        begun = self._begun.take([0] * len(prompts))
        return replace(self._read(begun, [prompt[self._num_common : -1] for prompt in prompts]), last_B=last_B)

    def nll(self, read: Read, answers: Sequence[Tokens]) -> list[float]:
        """-log p in nats of each answer after its prompt."""
        width = max(map(len, answers))
        inputs = np.full((len(answers), width), self._pad, dtype=np.int64)
        targets = np.full((len(answers), width), IGNORED, dtype=np.int64)
        for row, answer in enumerate(answers):
            inputs[row, 1 : len(answer)] = answer[:-1]
            targets[row, : len(answer)] = answer
        inputs[:, 0] = read.last_B.cpu()
        device = self.model.device
        behind = _behind(read, torch.from_numpy(targets != IGNORED).long().to(device))
        nll = next_token_nll(
            self.model, torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), **behind
        )
        return [values.double().sum().item() for values in nll.cpu().split([len(answer) for answer in answers])]

    def greedy(self, read: Read, stops: Collection[int], most: Sequence[int], put: Put) -> list[list[int]]:
        """Decode greedily after each prompt, up to and including a stop token, or up to its number of tokens in `most`.

        `put` receives each step's tokens, one for each prompt that is still being answered.
        """
        answers: list[list[int]] = [[] for _ in most]
        rows = list(range(len(most)))
        while rows:
            behind = _behind(read, read.is_token_BT.new_ones(len(rows), 1))
            logits = self.model(input_ids=read.last_B[:, None], **behind).logits[:, -1]
            read = Read(behind["cache"], behind["attention_mask"], logits.float().argmax(-1))
            put(read.last_B)
            for row, token in zip(rows, read.last_B.tolist(), strict=True):
                answers[row].append(token)
            going = [
                place
                for place, row in enumerate(rows)
                if answers[row][-1] not in stops and len(answers[row]) < most[row]
            ]
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                read = read.take(going)
        return answers

    def _read(self, read: Read, texts: Sequence[Tokens]) -> Read:
        width = max(map(len, texts))
        if not width:
            return read
        inputs = np.full((len(texts), width), self._pad, dtype=np.int64)
        for row, tokens in enumerate(texts):
            inputs[row, width - len(tokens) :] = tokens
        lengths = torch.tensor([len(tokens) for tokens in texts])
        is_token_BS = (torch.arange(width) >= width - lengths[:, None]).long().to(self.model.device)
        behind = _behind(read, is_token_BS)
        self._body(input_ids=torch.from_numpy(inputs).to(self.model.device), **behind)
        return Read(behind["cache"], behind["attention_mask"], read.last_B)


def _behind(read: Read, is_token_BS: torch.Tensor) -> dict[str, Any]:
    """Model inputs, without the token ids, to read S more tokens of each prompt; `read` stays unchanged."""
    is_token = torch.cat([read.is_token_BT, is_token_BS], dim=1)
    positions = (is_token.cumsum(1) - 1).clamp(min=0)[:, read.is_token_BT.shape[1] :]
    return {"cache": _to_grow(read.cache), "attention_mask": is_token, "position_ids": positions, "use_cache": True}


def _to_grow(cache: DynamicCache) -> DynamicCache:
    """A copy of the cache that can grow: updates create new tensors, so keys and values need not be copied here."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


logger = logging.getLogger(__name__)

CACHE_SHARE = 0.7
"""Share of the free memory that the KV cache may take; the rest is for the activations of the prefill."""


def in_batches(
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    work: Callable[[npt.NDArray[np.int64]], None],
    *,
    together: bool = False,
) -> None:
    """Call `work` on all indices in batches of similar length, longest first; halve the batch when out of memory.

    Set `together` where other workers make the same forward passes: then running out of memory is raised. Memory that
    does not hold even one record is a JobError.
    """
    order = np.argsort(-lengths, kind="stable")
    done = 0
    while done < len(order):
        indices = order[done : done + batch_size]
        try:
            work(indices)
        except torch.OutOfMemoryError as exc:
            if together:
                raise
            if len(indices) == 1:
                raise JobError(
                    f"the device's memory does not hold one record of {lengths[indices[0]]} tokens beside the model: "
                    "take a GPU with more memory, a quantised base (method.base), or a shorter model.max_length"
                ) from exc
            batch_size = len(indices) // 2
            logger.warning("out of memory with %d records at once: going on with %d", len(indices), batch_size)
        else:
            done += len(indices)
            continue
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps references to tensors


def with_room(batch_size: int, base: "PretrainedConfig", tokens: int, free_bytes: int | None) -> int:
    """The largest batch size up to `batch_size` whose KV cache fits, with `tokens` tokens per record; at least 1.

    `free_bytes` None means that memory sets no limit.
    """
    if free_bytes is None:
        return batch_size
    return max(1, min(batch_size, int(CACHE_SHARE * free_bytes / (tokens * cache_bytes_per_token(base)))))


def cache_bytes_per_token(base: "PretrainedConfig") -> int:
    """Bytes of the KV cache per token over all layers, in bfloat16; layers with a sliding window end up with less."""
    text = base.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * text.num_hidden_layers * heads * width)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the GPU plus what PyTorch's allocator holds in reserve, in bytes; None on CPUs, where other
    processes share the memory."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reserve)


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

    An answer ends at a stop token, after `max_new_tokens`, or where the base has no more positions. For one prompt,
    `on_text` receives the answer word by word as it is generated, and `on_token` its tokens and the stop token.
    """
    result = [""] * len(split)
    prompts = [split.prompt(row) for row in range(len(split))]
    reader = Reader(model, prompts, chat.pad) if prompts and Reader.takes(model) else None

    def answer(indices: npt.NDArray[np.int64]) -> None:
        batch = [prompts[index] for index in indices]
        words = None if on_text is None else _Words(chat, on_text, on_token)
        if reader is None:
            texts = [*map(chat.text_of, generated(model, chat, batch, max_new_tokens, streamer=words).tolist())]
        else:
            texts = answers_to(reader, reader.read(batch), batch, chat, max_new_tokens, words)
        for index, text in zip(indices, texts, strict=True):
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
        words = _Words(chat, on_text, on_token)
        chance = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        tokens = generated(model, chat, [split.prompt(0)], max_new_tokens, streamer=words, **chance)
    return str(chat.text_of(tokens[0].tolist()))


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
        if together:  # the smallest of all workers
            least = torch.tensor(at_once, device=model.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            at_once = int(least)
        in_batches(lengths, at_once, answer, together=together)


def answers_to(
    reader: Reader,
    read: Read,
    prompts: Sequence[Tokens],
    chat: ChatFormat,
    max_new_tokens: int,
    words: "_Words | None" = None,
) -> list[str]:
    """The greedy answers to prompts that a `Reader` has read."""
    reach = base_model.positions(reader.model.config)
    most = [_most(max_new_tokens, reach, len(prompt)) for prompt in prompts]
    if words is not None:
        words.put(torch.zeros(1))  # TextStreamer skips the first value, which it takes for the prompt
    answers = reader.greedy(read, chat.stops, most, put=words.put if words is not None else lambda _: None)
    if words is not None:
        words.end()
    return [*map(chat.text_of, answers)]


def generated(model: Any, chat: ChatFormat, prompts: Sequence[Tokens], max_new_tokens: int, **options: Any) -> Any:
    """The new tokens after each prompt, from transformers' own `generate`; padding follows a stop token.

    Call it within `answer_all`. `options` are passed to `generate`.
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
        max_new_tokens=_most(max_new_tokens, base_model.positions(model.config), width),
        synced_gpus=is_shared(model),
        **options,
    )
    return answers[:, width:]


def _most(max_new_tokens: int, reach: int | None, num_prompt_tokens: int) -> int:
    return max_new_tokens if reach is None else max(1, min(max_new_tokens, reach - num_prompt_tokens))


def _decoding(model: Any, chat: ChatFormat) -> AbstractContextManager[None]:
    """Within, the model's generation config is the chat format's.

    `generate` takes what its own argument leaves open from the model's generation config (transformers 5.24,
    generation/utils.py, `_prepare_generation_config`), where a base may ship penalties and banned tokens.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return replaced(owner, generation_config=chat.generation_config())


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
        if self._space is None:
            text = text.lstrip()
        words = text.rstrip()
        if not words:
            self._space = None if self._space is None else self._space + text
            return
        self._on_text((self._space or "") + words)
        self._space = text[len(words) :]


# Scoring one model on records: log-likelihood of the reference answer, and the greedy answer, both batched.


@torch.inference_mode()
def score(
    model: Any,
    chat: ChatFormat,
    records: Sequence[Record],
    *splits: TokenizedSplit,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance = lambda _: None,
    marks: Mapping[str, Mark] = MARKS,
) -> list[Score]:
    """Score `model`, in evaluation mode, on every record, whose tokens the first split holds in order; the second, if
    there is one, its answers behind other prompts.

    `advance` receives the number of records of each finished batch twice: once for its loss, once for its answers.
    """
    split, *others = splits
    if split.by_vllm is None and len(split) and Reader.takes(model):
        nll, texts = _reading_once(model, chat, splits, batch_size, max_new_tokens, advance)
    else:
        nll = [label_nll(model, split, batch_size, chat.pad, advance)]
        nll += [label_nll(model, other, batch_size, chat.pad) for other in others]
        to_answer = split if split.by_vllm is None else split.take(range(min(batch_size, len(split))))
        texts = greedy(model, chat, to_answer, batch_size, max_new_tokens, advance)
    answers = [without_reasoning(text) for text in split.by_vllm or texts]
    differs = dict(enumerate(map(ne, split.by_vllm or (), texts)))
    # Of tool calls, the text that the chat template writes for them.
    references = [
        without_reasoning(chat.text_of(split.answer(row)) if record.calls else record.answer)
        for row, record in enumerate(records)
    ]
    return [
        Score(
            nll=nll[0][row],
            other_prompt_nll=nll[1][row] if others else None,
            text=answer,
            marks={key: mark(answer, reference) for key, mark in marks.items()},
            differs=differs.get(row),
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
    of_parts = [[numbers.get(part.prompt(row).tobytes()) for row in range(len(part))] for part in parts]
    reader = Reader(model, prompts, chat.pad)
    nll = [[0.0] * len(part) for part in parts]
    texts = [""] * len(parts[0])

    def measure(indices: npt.NDArray[np.int64]) -> None:
        these = [prompts[index] for index in indices]
        places: dict[int | None, int] = {int(index): place for place, index in enumerate(indices)}
        read = reader.read(these)
        for part, numbers_of, losses in zip(parts, of_parts, nll, strict=True):
            rows = [row for row, number in enumerate(numbers_of) if number in places]
            for some in (rows[start : start + len(these)] for start in range(0, len(rows), len(these))):
                behind = read.take([places[numbers_of[row]] for row in some])
                for row, loss in zip(some, reader.nll(behind, [part.answer(row) for row in some]), strict=True):
                    losses[row] = loss
        answers = answers_to(reader, read, these, chat, max_new_tokens)
        own = [row for row, number in enumerate(of_parts[0]) if number in places]
        for row in own:
            texts[row] = answers[places[of_parts[0][row]]]
        advance(2 * len(own))

    lengths = np.array([len(prompt) for prompt in prompts])
    # Doubled: losses are computed on a copy of the KV cache.
    longest = int(lengths.max()) + max(max_new_tokens, int(max(part.num_answer_tokens.max() for part in parts)))
    at_once = with_room(batch_size, model.config, 2 * longest, free_bytes(model.device))
    in_batches(lengths, at_once, measure)
    for part, numbers_of, losses in zip(parts, of_parts, nll, strict=True):
        cut = [row for row, number in enumerate(numbers_of) if number is None]  # to fit another's answer
        for row, loss in zip(cut, label_nll(model, part.take(cut), batch_size, chat.pad), strict=True):
            losses[row] = loss
    return nll, texts


def other_prompts(split: TokenizedSplit, max_length: int) -> TokenizedSplit:
    """Pair each answer with the next record's prompt: a random one, as records are in the order of a hash."""
    answers = [split.answer(index) for index in range(len(split))]
    prompts = [
        split.prompt((index + 1) % len(split))[-max(1, max_length - len(answer)) :]
        for index, answer in enumerate(answers)
    ]
    rows = [np.concatenate(parts) for parts in zip(prompts, answers, strict=True)]
    return as_split(rows, [*map(len, prompts)], split.ids)


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
