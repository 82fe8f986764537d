"""The loss of each model on texts outside the domain: general text, and the base's own answers."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from components.config.schema import RunConfig
from components.records.steps import Evaluation, Role, TextLosses
from components.shared.paired import Array
from components.store.store import Store
from ray_jobs.probes import earlier
from ray_jobs.scoring.generation import answer_all, generated
from ray_jobs.scoring.measure import Contender
from ray_jobs.scoring.probe import Findings, Outcome, Rows, Subject
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.chat_format import ChatFormat

T = TypeVar("T")


@dataclass(frozen=True)
class Read:
    """The result of a model's reading a share of the texts."""

    nll: list[float]
    """Negative log-likelihood of each text, in nats."""
    answers: list[list[int]] | None = None
    """Tokens of the answers that the base generated first; None where it did not have to."""


@dataclass(frozen=True)
class Texts(ABC):
    """The texts to read, and the roles that have to read them."""

    split: TokenizedSplit
    roles: frozenset[Role]
    known: TextLosses
    """The losses that are already known."""

    METRIC: ClassVar[str]
    KIND: ClassVar[str]
    """The probe's key."""

    @abstractmethod
    def value(self, role: Role) -> float | None:
        """The metric of a model, computed from `known`."""

    def at(self, rows: Rows) -> Self:
        """A worker's share: the texts at `rows`."""
        return replace(self, split=self.split.take(rows(len(self.split))))

    def held_together(self) -> Self:
        """The same texts: they can be read with a sharded base too."""
        return self

    def run(self, subject: Subject, found: Findings) -> Read | None:
        """Measure a model's loss on each text; None where it is already known."""
        from ray_jobs.scoring.scoring import label_nll

        if subject.role not in self.roles:
            return None
        return Read(label_nll(subject.model, self.split, subject.batch_size, subject.chat.pad))

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        """The losses of each text, and the metric of each model; an empty outcome without texts."""
        if not len(self.split):
            return Outcome(None)
        whole = self.read(shares)
        return Outcome(whole.known, {role: {self.METRIC: whole.value(role)} for role in whole.known.nll})

    def read(self, shares: Sequence[Findings]) -> Self:
        """The texts with the losses from all shares added to `known`."""
        found = {role: in_order([share[role].nll for share in shares], len(self.split)) for role in self.roles}
        return replace(self, known=self.known.model_copy(update={"nll": {**self.known.nll, **found}}))

    def without_known(self, store: Store, config: RunConfig, contenders: Sequence[Contender]) -> Self:
        """The texts, for the contenders that no earlier run has measured on them."""
        if not len(self.split):
            return self

        def found(before: Evaluation) -> tuple[str, Mapping[Role, list[float]]] | None:
            losses: TextLosses | None = getattr(before, self.KIND)
            if losses is None or losses.text_sha256 != self.known.text_sha256:
                return None
            return losses.base_format, losses.nll

        nll = earlier.known(store, config, contenders, found)
        roles = frozenset({each.role for each in earlier.on_the_first_base(contenders)} - nll.keys())
        return replace(self, roles=roles, known=self.known.model_copy(update={"nll": nll}))


def as_split(
    rows: Sequence[Sequence[int]], num_prompt_tokens: Sequence[int], ids: Sequence[str] | None = None
) -> TokenizedSplit:
    """A split of these rows of tokens, in which all tokens after the prompt are labelled, so the loss counts them."""
    return TokenizedSplit(
        ids=list(ids) if ids is not None else [str(index) for index in range(len(rows))],
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        labelled=np.array(
            [place >= start for row, start in zip(rows, num_prompt_tokens, strict=True) for place in range(len(row))],
            dtype=np.bool_,
        ),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=[],
        cut=[],
    )


def sha256(split: TokenizedSplit) -> str:
    """The sha256 of the texts' tokens, in hex."""
    return hashlib.sha256(split.tokens.tobytes() + split.offsets.tobytes()).hexdigest()


def in_order(shares: Sequence[Sequence[T]], count: int) -> list[T]:
    """The first `count` items in their original order, from shares that were dealt out one by one (round-robin)."""
    return [value for each in zip_longest(*shares) for value in each if value is not None][:count]


# Sampling answers from a model at temperature 1, from the full distribution.


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
