"""Sampling answers from a model at temperature 1, from the full distribution."""

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
    """Sample an answer to each prompt, ending with its stop token, or cut after `max_new_tokens`.

    The random numbers depend only on the prompt's id, which is a number, so workers may share the prompts in any way.
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
    # The only one of numpy's random streams that is the same in every release (NEP 19).
    return np.random.RandomState([seed, int(prompt_id)]).random_sample(count)


def draw(logits_BV: torch.Tensor, chances_B: torch.Tensor) -> torch.Tensor:
    """A token from each row's softmax: the first whose cumulative probability exceeds the row's random number."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    reached_B1 = chances_B[:, None].to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, reached_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


class Drawing(LogitsProcessor):
    """Restricts greedy decoding to a single token, the one that was sampled.

    `generate` has its own sampling, whose random numbers depend on the batch.
    """

    def __init__(self, chances_BN: Array, *, begun: int) -> None:
        self._chances_BN = torch.from_numpy(chances_BN)
        self._begun = begun

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask all logits but the sampled token's; `generate` passes all tokens so far, padding included."""
        chosen_B = draw(scores, self._chances_BN[:, input_ids.shape[1] - self._begun].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)


def _until_stop(tokens: Sequence[int], stops: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: end + 1])
