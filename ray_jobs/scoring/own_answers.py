"""What the base itself answers to prompts of no domain: how far a model has moved from it where nobody taught it.

own_answers.json holds the prompts, in an order in which any beginning holds all kinds alike. The base answers each
once, in the run's chat template, at temperature 1 and from its whole distribution: to leave out tokens would bias what
follows. Then every model reads these answers, the base among them, and

    KL(base || model) = E [log p_base(y | x) - log p_model(y | x)]   over answers y that the base draws

is estimated by the mean of that difference over what was drawn. The estimate of an answer, whole or cut, has no bias;
per token it is a ratio of two sums. It may come out below zero. To sum over all next tokens instead of the one that was
drawn would vary less (Amini, Vieira and Cotterell, arXiv:2504.10637), but takes both models' distributions at every
token, where this takes a number for each answer and model, which is kept: later runs need no base for it.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.registry.records import TextLosses
from components.registry.store import Store
from ray_jobs.base.batching import tokenize
from ray_jobs.base.chat_format import ChatFormat
from ray_jobs.scoring import texts
from ray_jobs.scoring.texts import Texts

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

NEW_TOKENS = 64
"""Where an answer is cut: the beginning tells as much as the whole, in less time."""
SEED = 0
"""The same in every run, so that a later one finds the answers of an earlier."""


def to_read(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence["Contender"]) -> Texts:
    """The answers, for those who have not read them yet; where no earlier run has drawn them, the prompts."""
    asked = undrawn(chat, config)
    if not len(asked.split):
        return asked
    before = texts.earlier(store, config, contenders, "own_answers")
    for each in before:
        same = each.same_base and each.losses.asked_sha256 == asked.known.asked_sha256
        if same and each.losses.answers and "base" in each.losses.nll:
            asked = asked.answered(each.losses.answers)
            break
    return texts.still_to_read(asked, contenders, before)


def undrawn(chat: ChatFormat, config: RunConfig) -> Texts:
    """The first `evaluate.own_answers` prompts, as the base's chat template tells them; nobody has answered them."""
    source = json.loads(resources.files(__package__).joinpath("own_answers.json").read_text(encoding="utf-8"))
    asked = source["prompts"][: config.evaluate.own_answers]
    longest = min(NEW_TOKENS, config.model.max_length // 2)
    # An answer is needed to make a record; its prompt alone is taken.
    records = [Record(str(index), _turns(prompt["turns"]), "-") for index, prompt in enumerate(asked)]
    told = tokenize(records, chat, config.model.max_length - longest)
    rows = [told.prompt(row).tolist() for row in range(len(told))]
    split = texts.as_split(rows, [len(row) for row in rows], ids=told.ids)
    how = json.dumps([texts.sha256(split), split.ids, sorted(chat.stops), longest, SEED])
    known = TextLosses(
        text_sha256="",
        base_format=config.method.row.base,
        tokens=[],
        nll={},
        asked_sha256=hashlib.sha256(how.encode()).hexdigest(),
    )
    return Texts(split, frozenset(), known, new_tokens=longest if asked else 0)


def _turns(said: Sequence[str]) -> list[Message]:
    return [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(said)]
