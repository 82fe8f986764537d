"""How far a model has moved from its base outside the training data, measured on the base's own answers.

own_answers.json holds the prompts, ordered so that any prefix contains all kinds evenly. The base answers each once, in
the run's chat template, by sampling at temperature 1 from the full distribution: truncated sampling would bias the
estimate. Then every model, including the base, scores these answers, and

    KL(base || model) = E [log p_base(y | x) - log p_model(y | x)]   over answers y that the base draws

is estimated by the mean of that difference over the samples. The estimate per answer, whole or cut, is unbiased; per
token it is a ratio of two sums. It may be negative. Summing over all next tokens instead of the sampled one would have
a lower variance (Amini, Vieira and Cotterell, arXiv:2504.10637), but needs both models' distributions at every token.
This needs one number per answer and model, which is stored, so later runs do not need the base for it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Self

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.records.steps import Role, TextLosses
from components.store.store import Store
from ray_jobs.probes import earlier, texts
from ray_jobs.probes.texts import Read
from ray_jobs.scoring.measure import Contender
from ray_jobs.scoring.probe import Findings, Subject
from ray_jobs.text.batching import tokenize
from ray_jobs.text.chat_format import ChatFormat

NEW_TOKENS = 64
"""Maximum tokens of an answer: its beginning shows as much as the whole, in less time."""
SEED = 0
"""Sampling seed, the same in every run, so that later runs can reuse the answers of earlier ones."""


@dataclass(frozen=True)
class OwnAnswers(texts.Texts):
    """The base's answers for the models to score; before the answers are drawn, `split` holds the prompts."""

    new_tokens: int = 0
    """Maximum tokens of the answers that the base has yet to draw; 0 if no answers need to be drawn."""

    METRIC, KIND = "kl_from_base", "own_answers"

    def value(self, role: Role) -> float | None:
        """The KL divergence from the base, per token."""
        return self.known.above_base(role)

    def run(self, subject: Subject, found: Findings) -> Read | None:
        """Have a model score the answers; the base draws them first, if that is still to be done."""
        from ray_jobs.probes.texts import sample

        if not self.new_tokens:
            return super().run(subject, found)
        if subject.role == "base":
            answers = sample(subject.model, subject.chat, self.split, subject.batch_size, self.new_tokens, seed=SEED)
        else:
            answers = found["base"].answers
        read = self.answered(answers).run(subject, found)
        return read and replace(read, answers=answers if subject.role == "base" else None)

    def read(self, shares: Sequence[Findings]) -> Self:
        """This probe with the findings of all shares merged: the answers first, then the losses."""
        if not self.new_tokens:
            return super().read(shares)
        answers = texts.in_order([share["base"].answers for share in shares], len(self.split))
        return self.answered(answers).read(shares)

    def answered(self, answers: Sequence[Sequence[int]]) -> Self:
        """This probe with the base's answer to each prompt."""
        prompts = [self.split.prompt(row).tolist() for row in range(len(self.split))]
        split = texts.as_split(
            [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)],
            [len(prompt) for prompt in prompts],
            ids=self.split.ids,
        )
        update = {"answers": [list(answer) for answer in answers], "tokens": split.num_answer_tokens.tolist()}
        known = self.known.model_copy(update={**update, "text_sha256": texts.sha256(split)})
        return replace(self, split=split, known=known, new_tokens=0)


def prepare(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]) -> OwnAnswers:
    """The answers, for the models that have not scored them yet; the prompts, if no earlier run has drawn answers."""
    ours = undrawn(chat, config)
    if not len(ours.split):
        return ours
    for _, before, same_base in earlier.evaluations(store, contenders):
        theirs = before.own_answers
        if theirs is None or not same_base or theirs.base_format != ours.known.base_format:
            continue
        if theirs.asked_sha256 == ours.known.asked_sha256 and theirs.answers and "base" in theirs.nll:
            ours = ours.answered(theirs.answers)
            break
    return ours.without_known(store, config, contenders)


def undrawn(chat: ChatFormat, config: RunConfig) -> OwnAnswers:
    """The first `evaluate.own_answers` prompts in the base's chat template, still without answers."""
    source = json.loads(resources.files(__package__).joinpath("own_answers.json").read_text(encoding="utf-8"))
    prompts = source["prompts"][: config.evaluate.own_answers]
    longest = min(NEW_TOKENS, config.model.max_length // 2)
    # A record needs an answer; only its prompt is used.
    records = [Record(str(index), _turns(prompt["turns"]), "-") for index, prompt in enumerate(prompts)]
    tokenized = tokenize(records, chat, config.model.max_length - longest)
    rows = [tokenized.prompt(row).tolist() for row in range(len(tokenized))]
    split = texts.as_split(rows, [len(row) for row in rows], ids=tokenized.ids)
    how = json.dumps([texts.sha256(split), split.ids, sorted(chat.stops), longest, SEED])
    known = TextLosses(
        text_sha256="",
        base_format=config.method.row.base,
        tokens=[],
        nll={},
        asked_sha256=hashlib.sha256(how.encode()).hexdigest(),
    )
    return OwnAnswers(split, frozenset(), known, new_tokens=longest if prompts else 0)


def _turns(said: Sequence[str]) -> list[Message]:
    return [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(said)]
