"""Reading each prompt once (prefill), both for the losses of answers and for greedy decoding.

A prefix that all prompts share, such as a system message and an instruction, is read only once. This needs a model that
caches keys and values of every token and nothing else: no sliding windows, chunks or recurrent states.

Shapes: B prompts, T positions in the cache of each, S tokens that are read at once.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from ray_jobs.base.attention import FLOAT32, RECORDS, looks_at_all_before
from ray_jobs.scoring.batches import is_shared
from ray_jobs.text.answer_loss import next_token_nll
from ray_jobs.text.batching import IGNORED, common_beginning

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
        found: list[list[int]] = [[] for _ in most]
        rows = list(range(len(most)))
        while rows:
            behind = _behind(read, read.is_token_BT.new_ones(len(rows), 1))
            logits = self.model(input_ids=read.last_B[:, None], **behind).logits[:, -1]
            read = Read(behind["cache"], behind["attention_mask"], logits.float().argmax(-1))
            put(read.last_B)
            for row, token in zip(rows, read.last_B.tolist(), strict=True):
                found[row].append(token)
            going = [
                place for place, row in enumerate(rows) if found[row][-1] not in stops and len(found[row]) < most[row]
            ]
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                read = read.take(going)
        return found

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
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found
