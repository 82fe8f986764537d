"""The loss of each model on texts outside the domain: general text, and the base's own answers."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import zip_longest
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.records.steps import Evaluation, Role, TextLosses
from components.shared.paired import Array
from components.store.store import Store
from ray_jobs.scoring.generation import answer_all, generated, label_nll
from ray_jobs.scoring.measure import (
    Contender,
    Findings,
    Outcome,
    Rows,
    Subject,
    earlier_evaluations,
    earlier_measurements,
    on_the_first_base,
)
from ray_jobs.text.batching import TokenizedSplit, as_split, tokenize
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
    losses: TextLosses
    """Those that earlier runs measured."""

    METRIC: ClassVar[str]
    KIND: ClassVar[str]
    """The probe's key."""

    @abstractmethod
    def value(self, role: Role) -> float | None:
        """The metric of a model, computed from `losses`."""

    def at(self, rows: Rows) -> Self:
        return replace(self, split=self.split.take(rows(len(self.split))))

    def held_together(self) -> Self:
        return self

    def run(self, subject: Subject, findings: Findings) -> Read | None:
        if subject.role not in self.roles:
            return None
        return Read(label_nll(subject.model, self.split, subject.batch_size, subject.chat.pad))

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        if not len(self.split):
            return Outcome(None)
        whole = self.read(shares)
        return Outcome(whole.losses, {role: {self.METRIC: whole.value(role)} for role in whole.losses.nll})

    def read(self, shares: Sequence[Findings]) -> Self:
        nll = {role: in_order([share[role].nll for share in shares], len(self.split)) for role in self.roles}
        return replace(self, losses=self.losses.model_copy(update={"nll": {**self.losses.nll, **nll}}))

    def without_measured(self, store: Store, config: RunConfig, contenders: Sequence[Contender]) -> Self:
        if not len(self.split):
            return self

        def losses_of(before: Evaluation) -> tuple[str, Mapping[Role, list[float]]] | None:
            losses: TextLosses | None = getattr(before, self.KIND)
            if losses is None or losses.text_sha256 != self.losses.text_sha256:
                return None
            return losses.base_format, losses.nll

        nll = earlier_measurements(store, config, contenders, losses_of)
        roles = frozenset({contender.role for contender in on_the_first_base(contenders)} - nll.keys())
        return replace(self, roles=roles, losses=self.losses.model_copy(update={"nll": nll}))


def sha256(split: TokenizedSplit) -> str:
    """The sha256 of the texts' tokens, in hex."""
    return hashlib.sha256(split.tokens.tobytes() + split.offsets.tobytes()).hexdigest()


def in_order(shares: Sequence[Sequence[T]], count: int) -> list[T]:
    """The first `count` items in their original order, from shares that were dealt out one by one (round-robin)."""
    return [value for values in zip_longest(*shares) for value in values if value is not None][:count]


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
        # The only one of numpy's random streams that is the same in every release (NEP 19).
        streams = [np.random.RandomState([seed, int(prompts.ids[index])]) for index in indices]
        chances_BN = np.stack([stream.random_sample(max_new_tokens) for stream in streams])
        drawing = LogitsProcessorList([Drawing(chances_BN, begun=max(map(len, batch)))])
        tokens = generated(model, chat, batch, max_new_tokens, logits_processor=drawing)
        for index, row in zip(indices, tokens.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in chat.stops), len(row) - 1)
            result[index] = row[: end + 1]

    answer_all(model, chat, prompts, batch_size, max_new_tokens, answer)
    return result


class Drawing(LogitsProcessor):
    """Restricts greedy decoding to a single token, the one that was sampled.

    `generate` has its own sampling, whose random numbers depend on the batch.
    """

    def __init__(self, chances_BN: Array, *, begun: int) -> None:
        self._chances_BN = torch.from_numpy(chances_BN)
        self._begun = begun

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask all logits but that of the first token whose cumulative probability exceeds the row's random number;
        `generate` passes all tokens so far, padding included."""
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        chances_B1 = self._chances_BN[:, input_ids.shape[1] - self._begun, None].to(cumulative_BV)
        chosen_B1 = torch.searchsorted(cumulative_BV, chances_B1 * cumulative_BV[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1.clamp(max=scores.shape[-1] - 1), 0.0)


# General-domain text, which shows whether an adapter forgets what its base knows: the passages of general_text.json,
# ordered so that any prefix contains all kinds evenly, read as plain text, with the loss over all tokens but the first.

MAX_TOKENS = 128
"""Maximum number of tokens read per passage: the beginning shows as much as the whole, in less time."""


class Passages(Texts):
    """The passages of general text, as texts to read."""

    METRIC, KIND = "general_loss", "general_text"

    def value(self, role: Role) -> float | None:
        return self.losses.loss(role)


def prepare_passages(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]) -> Passages:
    """The passages, for the contenders that no earlier run has measured on them."""
    return unread_passages(chat, config).without_measured(store, config, contenders)


def unread_passages(chat: ChatFormat, config: RunConfig) -> Passages:
    """The first `evaluate.general_passages` passages, with the special tokens that the tokenizer adds, still unread."""
    source = json.loads(resources.files(__package__).joinpath("general_text.json").read_text(encoding="utf-8"))
    passages = [passage["text"] for passage in source["passages"][: config.evaluate.general_passages]]
    longest = min(MAX_TOKENS, config.model.max_length)
    rows = [row[:longest] for row in chat.tokenizer(passages)["input_ids"]] if passages else []
    split = as_split(rows, [1] * len(rows))
    losses = TextLosses(
        text_sha256=sha256(split), base_format=config.method.row.base, tokens=split.num_answer_tokens.tolist(), nll={}
    )
    return Passages(split, frozenset(), losses)


# How far a model has moved from its base outside the training data, measured on the base's own answers.
#
# The base answers the prompts of own_answers.json once, by sampling at temperature 1 from the full distribution. Every
# model scores these answers, and the mean of log p_base(y | x) - log p_model(y | x) over them estimates
# KL(base || model), per answer without bias. Summing over all next tokens would have a lower variance (Amini, Vieira
# and Cotterell, arXiv:2504.10637), but needs both models' distributions at every token; of this, one number per answer
# and model is stored, so that later runs do not need the base for it.

NEW_TOKENS = 64
"""Maximum tokens of an answer: its beginning shows as much as the whole, in less time."""
SEED = 0
"""Sampling seed, the same in every run, so that later runs can reuse the answers of earlier ones."""


@dataclass(frozen=True)
class OwnAnswers(Texts):
    """The base's answers for the models to score; before the answers are drawn, `split` holds the prompts."""

    new_tokens: int = 0
    """Maximum tokens of the answers that the base has yet to draw; 0 if there are none to draw."""

    METRIC, KIND = "kl_from_base", "own_answers"

    def value(self, role: Role) -> float | None:
        return self.losses.above_base(role)

    def run(self, subject: Subject, findings: Findings) -> Read | None:
        if not self.new_tokens:
            return super().run(subject, findings)
        if subject.role == "base":
            answers = sample(subject.model, subject.chat, self.split, subject.batch_size, self.new_tokens, seed=SEED)
        else:
            answers = findings["base"].answers
        read = self.answered(answers).run(subject, findings)
        return read and replace(read, answers=answers if subject.role == "base" else None)

    def read(self, shares: Sequence[Findings]) -> Self:
        """This probe with the findings of all shares merged: the answers first, then the losses."""
        if not self.new_tokens:
            return super().read(shares)
        answers = in_order([share["base"].answers for share in shares], len(self.split))
        return self.answered(answers).read(shares)

    def answered(self, answers: Sequence[Sequence[int]]) -> Self:
        prompts = [self.split.prompt(row).tolist() for row in range(len(self.split))]
        split = as_split(
            [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)],
            [len(prompt) for prompt in prompts],
            ids=self.split.ids,
        )
        update = {"answers": [list(answer) for answer in answers], "tokens": split.num_answer_tokens.tolist()}
        losses = self.losses.model_copy(update={**update, "text_sha256": sha256(split)})
        return replace(self, split=split, losses=losses, new_tokens=0)


def prepare_own_answers(
    store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]
) -> OwnAnswers:
    """The answers, for the models that have not scored them yet; the prompts, if no earlier run has drawn answers."""
    ours = undrawn(chat, config)
    if not len(ours.split):
        return ours
    for _, before, same_base in earlier_evaluations(store, contenders):
        theirs = before.own_answers
        if theirs is None or not same_base or theirs.base_format != ours.losses.base_format:
            continue
        if theirs.asked_sha256 == ours.losses.asked_sha256 and theirs.answers and "base" in theirs.nll:
            ours = ours.answered(theirs.answers)
            break
    return ours.without_measured(store, config, contenders)


def undrawn(chat: ChatFormat, config: RunConfig) -> OwnAnswers:
    """The first `evaluate.own_answers` prompts in the base's chat template, still without answers."""
    source = json.loads(resources.files(__package__).joinpath("own_answers.json").read_text(encoding="utf-8"))
    prompts = source["prompts"][: config.evaluate.own_answers]
    longest = min(NEW_TOKENS, config.model.max_length // 2)
    # A record needs an answer; only its prompt is used.
    records = [
        Record(
            str(number),
            [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(prompt["turns"])],
            "-",
        )
        for number, prompt in enumerate(prompts)
    ]
    tokenized = tokenize(records, chat, config.model.max_length - longest)
    rows = [tokenized.prompt(row).tolist() for row in range(len(tokenized))]
    split = as_split(rows, [len(row) for row in rows], ids=tokenized.ids)
    how = json.dumps([sha256(split), split.ids, sorted(chat.stops), longest, SEED])
    losses = TextLosses(
        text_sha256="",
        base_format=config.method.row.base,
        tokens=[],
        nll={},
        asked_sha256=hashlib.sha256(how.encode()).hexdigest(),
    )
    return OwnAnswers(split, frozenset(), losses, new_tokens=longest if prompts else 0)
