"""General-domain text, which shows whether an adapter forgets what its base knows.

general_text.json holds the passages and their sources: modern encyclopaedic and technical prose, fiction and old
science, ordered so that any prefix contains all kinds evenly. A passage is read as plain text, without a chat template,
and the loss is taken over all its tokens but the first.
"""

import json
from collections.abc import Sequence
from importlib import resources

from components.config.schema import RunConfig
from components.records.steps import Role, TextLosses
from components.store.store import Store
from ray_jobs.probes import texts
from ray_jobs.scoring.measure import Contender
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.chat_format import ChatFormat

MAX_TOKENS = 128
"""Maximum number of tokens read per passage: the beginning shows as much as the whole, in less time."""


class Passages(texts.Texts):
    """The passages of general text, as texts to read."""

    METRIC, KIND = "general_loss", "general_text"

    def value(self, role: Role) -> float | None:
        """The mean loss per token, in nats."""
        return self.known.loss(role)


def prepare(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]) -> Passages:
    """The passages, for the contenders that no earlier run has measured on them."""
    return unread(chat, config).without_known(store, config, contenders)


def unread(chat: ChatFormat, config: RunConfig) -> Passages:
    """The passages, which no model has read yet."""
    split = read(chat, config)
    known = TextLosses(
        text_sha256=texts.sha256(split),
        base_format=config.method.row.base,
        tokens=split.num_answer_tokens.tolist(),
        nll={},
    )
    return Passages(split, frozenset(), known)


def read(chat: ChatFormat, config: RunConfig) -> TokenizedSplit:
    """The first `evaluate.general_passages` passages as tokens, with the special tokens that the tokenizer adds."""
    source = json.loads(resources.files(__package__).joinpath("general_text.json").read_text(encoding="utf-8"))
    passages = [passage["text"] for passage in source["passages"][: config.evaluate.general_passages]]
    longest = min(MAX_TOKENS, config.model.max_length)
    rows = [row[:longest] for row in chat.tokenizer(passages)["input_ids"]] if passages else []
    return texts.as_split(rows, [1] * len(rows))
