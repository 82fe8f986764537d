"""What models read beside the held-out records: texts of no domain, and how surprising each finds them.

Two kinds are read alike: general text, and the base's own answers. What an earlier run has measured of base and
champion on the same text is not measured again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from components.config.schema import RunConfig
from components.registry.records import Role, TextLosses
from components.registry.store import Store
from components.shared.metrics import TextKind
from ray_jobs.base.batching import TokenizedSplit
from ray_jobs.scoring.earlier import measured_before, on_the_first_base

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

T = TypeVar("T")


@dataclass(frozen=True)
class ReadShare:
    """What one worker found in its share of the texts."""

    nll: dict[Role, list[float]]
    """-log p of each, in nats; of the roles that had to read them."""
    answers: list[list[int]] | None = None
    """What the base answered; None where nobody had to ask it."""


@dataclass(frozen=True)
class Texts:
    """What is to be read, and by whom."""

    split: TokenizedSplit
    roles: frozenset[Role]
    known: TextLosses
    """What is there already."""
    new_tokens: int = 0
    """How long the base's answers may be that have to be drawn first: then `split` holds prompts. 0 draws none."""

    def share(self, index: int, of: int) -> "Texts":
        """Every `of`-th text from `index` on."""
        return replace(self, split=self.split.take(range(index, len(self.split), of)))

    def answered(self, answers: Sequence[Sequence[int]]) -> "Texts":
        """With what the base has said to each prompt."""
        prompts = [self.split.prompt(row).tolist() for row in range(len(self.split))]
        split = as_split(
            [prompt + list(answer) for prompt, answer in zip(prompts, answers, strict=True)],
            [len(prompt) for prompt in prompts],
            ids=self.split.ids,
        )
        told = {"answers": [list(answer) for answer in answers], "tokens": split.num_answer_tokens.tolist()}
        known = self.known.model_copy(update={**told, "text_sha256": sha256(split)})
        return replace(self, split=split, known=known, new_tokens=0)

    def measured(self, shares: Sequence[ReadShare]) -> TextLosses | None:
        """What is known once each share was read; None where there was nothing to read."""
        if not len(self.split):
            return None
        known = self.known
        if self.new_tokens:
            known = self.answered(dealt_back([share.answers or [] for share in shares])).known
        found = {role: dealt_back([share.nll[role] for share in shares]) for role in self.roles}
        return known.model_copy(update={"nll": {**known.nll, **found}})


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has measured."""

    role: Role
    """What its candidate is in this one."""
    losses: TextLosses
    same_base: bool
    """Whether its base was this one's, in the same format."""


def earlier(store: Store, config: RunConfig, contenders: Sequence["Contender"], kind: TextKind) -> list[Earlier]:
    """What the runs that made the contenders have measured on texts of a kind."""
    base_format, identity = config.method.row.base, contenders[0].base_identity
    result = []
    for contender in on_the_first_base(contenders):
        before = measured_before(store, contender)
        losses: TextLosses | None = getattr(before, kind) if before else None
        if before is not None and losses is not None:
            same_base = (losses.base_format, before.base.get("identity")) == (base_format, identity)
            result.append(Earlier(contender.role, losses, same_base))
    return result


def still_to_read(texts: Texts, contenders: Sequence["Contender"], before: Sequence[Earlier]) -> Texts:
    """The texts, for those who have not read them yet."""
    nll: dict[Role, list[float]] = {}
    for each in before:
        if each.losses.text_sha256 != texts.known.text_sha256:
            continue
        if "candidate" in each.losses.nll:
            nll[each.role] = each.losses.nll["candidate"]
        if "base" in each.losses.nll and each.same_base:
            nll["base"] = each.losses.nll["base"]
    ours = {each.role for each in on_the_first_base(contenders)}
    roles = frozenset(ours - nll.keys() if len(texts.split) else ())
    return replace(texts, roles=roles, known=texts.known.model_copy(update={"nll": nll}))


def as_split(
    rows: Sequence[Sequence[int]], num_prompt_tokens: Sequence[int], ids: Sequence[str] | None = None
) -> TokenizedSplit:
    """Rows of tokens, of which all that follow the prompt are read for their surprise."""
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
    """Of the texts, as a tokenizer reads them."""
    return hashlib.sha256(split.tokens.tobytes() + split.offsets.tobytes()).hexdigest()


def dealt_back(shares: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt out one by one, in its order."""
    return [value for each in zip_longest(*shares) for value in each if value is not None]
