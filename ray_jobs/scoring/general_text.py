"""Text of no domain, on which it shows whether an adapter forgets what its base knows.

general_text.json holds the passages and says where they are from: modern encyclopaedic and technical prose, fiction and
old science, in an order in which any beginning holds all of them alike. A passage is read as it stands, without a chat
template, and every token of it but the first counts.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from components.config.schema import RunConfig
from components.registry.records import Evaluation, GeneralText, Role
from components.registry.store import Store
from components.registry.versions import Version, evaluation
from components.shared.errors import IntegrityError
from ray_jobs.base.batching import TokenizedSplit
from ray_jobs.base.chat_format import ChatFormat

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

logger = logging.getLogger(__name__)

MAX_TOKENS = 128
"""Of a passage: the beginning tells as much as the whole, in less time."""


@dataclass(frozen=True)
class Passages:
    """What is to be read, and by whom."""

    split: TokenizedSplit
    roles: frozenset[Role]
    known: GeneralText
    """What is there already."""

    def share(self, index: int, of: int) -> "Passages":
        """Every `of`-th passage from `index` on."""
        return replace(self, split=self.split.take(range(index, len(self.split), of)))

    def measured(self, shares: Sequence[Mapping[Role, Sequence[float]]]) -> GeneralText | None:
        """What is known once each share was read; None where there was nothing to read."""
        if not len(self.split):
            return None
        found = {
            role: [
                value for each in zip_longest(*(share[role] for share in shares)) for value in each if value is not None
            ]
            for role in self.roles
        }
        return self.known.model_copy(update={"nll": {**self.known.nll, **found}})


def to_read(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence["Contender"]) -> Passages:
    """The passages, for those who have not read them yet.

    Of the versions of earlier runs, and of the base, it is known what those runs have measured on the same text.
    Whoever stands on another base than the first one is left out: other tokens, and another thing to remember.
    """
    passages = unread(chat, config)
    base_format, identity = config.method.row.base, contenders[0].base_identity
    ours = [each for each in contenders if each.base_identity == identity]
    nll: dict[Role, list[float]] = {}
    for contender in ours:
        before = _measured_before(store, contender.version) if contender.version else None
        known = before.general_text if before else None
        if before is None or known is None or known.text_sha256 != passages.known.text_sha256:
            continue
        if "candidate" in known.nll:
            nll[contender.role] = known.nll["candidate"]
        if "base" in known.nll and (known.base_format, before.base.get("identity")) == (base_format, identity):
            nll["base"] = known.nll["base"]
    roles = frozenset({each.role for each in ours} - nll.keys() if len(passages.split) else ())
    return replace(passages, roles=roles, known=passages.known.model_copy(update={"nll": nll}))


def unread(chat: ChatFormat, config: RunConfig) -> Passages:
    """The passages, which nobody has read."""
    split = read(chat, config)
    sha256 = hashlib.sha256(split.tokens.tobytes() + split.offsets.tobytes()).hexdigest()
    tokens, base_format = split.num_answer_tokens.tolist(), config.method.row.base
    return Passages(split, frozenset(), GeneralText(text_sha256=sha256, base_format=base_format, tokens=tokens, nll={}))


def _measured_before(store: Store, version: Version) -> Evaluation | None:
    try:
        return evaluation(store, version)
    except IntegrityError as exc:
        logger.info("%s: the general text is read again", exc)
        return None


def read(chat: ChatFormat, config: RunConfig) -> TokenizedSplit:
    """The first `evaluate.general_passages` of them, as the base's tokenizer begins and reads a text."""
    source = json.loads(resources.files(__package__).joinpath("general_text.json").read_text(encoding="utf-8"))
    texts = [passage["text"] for passage in source["passages"][: config.evaluate.general_passages]]
    longest = min(MAX_TOKENS, config.model.max_length)
    return _as_split([row[:longest] for row in chat.tokenizer(texts)["input_ids"]] if texts else [])


def _as_split(rows: Sequence[Sequence[int]]) -> TokenizedSplit:
    return TokenizedSplit(
        ids=[str(index) for index in range(len(rows))],
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        labelled=np.array([place > 0 for row in rows for place in range(len(row))], dtype=np.bool_),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        num_prompt_tokens=np.ones(len(rows), dtype=np.int32),
        too_long=[],
        cut=[],
    )


NO_PASSAGES = Passages(_as_split([]), frozenset(), GeneralText(text_sha256="", tokens=[], nll={}))
