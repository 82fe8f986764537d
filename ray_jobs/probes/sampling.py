"""Answers that are drawn from a model at temperature 1, from its whole distribution."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from components.shared.paired import Array
from ray_jobs.scoring.generation import answer_all, generated
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.chat_format import ChatFormat


@torch.inference_mode()
def sample(
    model: Any, chat: ChatFormat, prompts: TokenizedSplit, batch_size: int, max_new_tokens: int, *, seed: int = 0
) -> list[list[int]]:
    """An answer to each prompt, with the stop that ends it, or cut after `max_new_tokens`.

    The random numbers depend on a prompt's id alone, which is a number: prompts may be shared out in any way.
    """
    result: list[list[int]] = [[] for _ in range(len(prompts))]

    def answer(indices: npt.NDArray[np.int64]) -> None:
        batch = [prompts.prompt(index) for index in indices]
        chances_BN = np.stack([chances(prompts.ids[index], max_new_tokens, seed) for index in indices])
        drawing = LogitsProcessorList([Drawing(chances_BN, begun=max(map(len, batch)))])
        found = generated(model, chat, batch, max_new_tokens, logits_processor=drawing)
        for index, row in zip(indices, found.tolist(), strict=True):
            result[index] = _until_stop(row, chat.stops)

    answer_all(model, chat, prompts, batch_size, max_new_tokens, answer)
    return result


def chances(prompt_id: str, count: int, seed: int = 0) -> Array:
    """A prompt's random numbers in [0, 1), one for each token of its answer."""
    # Of numpy's streams of random numbers, this one stays as it is in every release (NEP 19).
    return np.random.RandomState([seed, int(prompt_id)]).random_sample(count)


def draw(logits_BV: torch.Tensor, chances_B: torch.Tensor) -> torch.Tensor:
    """A token of each row's softmax: the first at which the distribution function exceeds the row's chance."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    reached_B1 = chances_B[:, None].to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, reached_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


class Drawing(LogitsProcessor):
    """Leaves greedy decoding one token to choose: the one that was drawn.

    `generate` has its own sampling, whose random numbers depend on the batch.
    """

    def __init__(self, chances_BN: Array, *, begun: int) -> None:
        self._chances_BN = torch.from_numpy(chances_BN)
        self._begun = begun

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` with all tokens so far, padding included, and the logits of the next."""
        chosen_B = draw(scores, self._chances_BN[:, input_ids.shape[1] - self._begun].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)


def _until_stop(tokens: Sequence[int], stops: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: end + 1])
