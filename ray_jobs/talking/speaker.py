"""Models that answer in a conversation: a version on its own base, and that base alone.

They are prompted as in training and evaluation, and decode with the same code.
"""

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.registry.versions import Version, pull_version
from components.store.store import Store
from ray_jobs.adapters import build, own_base, recorded
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import door
from ray_jobs.planning import capacity
from ray_jobs.scoring.generation import OnText, greedy, sampled
from ray_jobs.text import chat_format
from ray_jobs.text.batching import tokenize
from ray_jobs.text.chat_format import ChatFormat

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 256  # tokens, where the run sets no evaluate.max_new_tokens


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    prompt_tokens: int
    tokens: int
    """Of the answer, its stop token included."""
    ended: bool
    """By a stop token, rather than by the maximum length."""


@dataclass(frozen=True)
class Speaker:
    """One model that answers: a version, or its base."""

    name: str
    chat_as: ChatFormat
    max_length: int
    """Maximum number of tokens of a conversation, as in training; a longer one loses its beginning."""
    longest: int
    """Default maximum number of tokens of an answer: the one that the run's config sets, or LONGEST_ANSWER."""
    model: Any
    is_base: bool = False
    """Whether the model answers without its adapter, where it has one."""

    def answer(
        self, turns: Sequence[Message], *, on_text: OnText, max_tokens: int | None = None, temperature: float = 0.0
    ) -> Reply:
        """Answer the last turn, greedily at temperature 0; `on_text` receives the text word by word as it comes."""
        # A record needs an answer, hence the placeholder; generation sees only the prompt.
        split = tokenize([Record("prompt", list(turns), "-")], self.chat_as, self.max_length)
        if split.cut:
            logger.warning(
                "the conversation is longer than %d tokens: the model does not see its beginning", self.max_length
            )
        without = self.is_base and hasattr(self.model, "disable_adapter")
        most, tokens = max_tokens or self.longest, list[int]()
        how: dict[str, Any] = {"on_text": on_text, "on_token": tokens.append}
        with self.model.disable_adapter() if without else contextlib.nullcontext():
            if temperature:
                text = sampled(self.model, self.chat_as, split, most, temperature, **how)
            else:
                (text,) = greedy(self.model, self.chat_as, split, 1, most, **how)
        ended = bool(tokens) and tokens[-1] in self.chat_as.stops
        return Reply(text, int(split.num_prompt_tokens[0]), len(tokens), ended)


@dataclass(frozen=True)
class AsTrained:
    """The form of the records of a training."""

    system: str
    """The system message that all records began with; empty where they differ or the dataset is gone."""
    in_turns: bool
    """Whether some records are conversations of several turns."""


def as_trained(config: RunConfig, store: Store, version: Version) -> AsTrained:
    """The form of the version's training records, as far as the dataset's profile says."""
    key = f"{store.key(recorded.read(config, store, version).dataset_uri).rstrip('/')}/profile.json"
    profile = store.get_json(key) if store.exists(key) else {}
    samples = profile.get("splits", {}).get("train", {}).get("samples", [])
    in_turns = any(turn["role"] == "assistant" for sample in samples for turn in sample["prompt"])
    return AsTrained(profile.get("system_message") or "", in_turns)


def load(config: RunConfig, store: Store, version: Version, name: str, *, with_base: bool) -> list[Speaker]:
    """Load the version as a speaker `name`, and with `with_base` the base that it was trained on as another. Both share
    one base in memory, unless the version has a base of its own. Raises ConfigError: its base needs code that `config`
    does not allow to run; IntegrityError: its base has changed since the training."""
    its_run = recorded.read(config, store, version)
    own = its_run.config
    logger.info("loading %s", own.model.base)
    base = base_model.resolve(own.model, recorded=its_run.base_identity, registry=store)
    use_gpu = capacity.on_gpus(own, base)
    stands_on = own_base.find(own, base, store, sha256=its_run.stands_on_sha256)
    kernels = door.choose(config, base_model.load_config(base.path, own.model), on_gpu=use_gpu)

    def load_base(base: Base) -> Any:
        model = door.load_model(base, own.model, own.method.row.base, kernels, use_gpu=use_gpu, across_gpus=True).eval()
        kernels.hold_dense_if_room(model)
        return model

    model = load_base(stands_on)
    alone = load_base(base) if with_base and stands_on != base else None
    logger.info("loading %s %s", version.name, version.version)
    with tempfile.TemporaryDirectory(prefix="fineloop-chat-") as scratch:
        folder = Path(scratch) / "adapter"
        pull_version(store, version, folder)
        chat_as = chat_format.of_version(version, folder, base, own.model)
        adapted = kernels.adopt(build.load(model, folder)).eval()
    for loaded in (adapted, alone):
        if loaded is not None:
            door.adopt_single_rows(loaded)
    how = (chat_as, own.model.max_length, its_run.max_new_tokens or LONGEST_ANSWER)
    speakers = [Speaker(name, *how, adapted)]
    return [*speakers, Speaker("base", *how, alone or adapted, is_base=True)] if with_base else speakers
