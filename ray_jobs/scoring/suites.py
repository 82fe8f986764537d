"""Small sets of questions outside the domain, on which it shows whether an adapter unlearns what its base can do.

suites.json holds them and says whose they are. A question is told in the base's chat template and answered greedily, by
every model in the same tokens; plain functions say whether the answer passes (`checks`, `tool_calls`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig, SuiteName
from components.prepare.dataset import Message, Record
from components.registry.records import ROLES, Evaluation, Role
from components.registry.store import Store
from components.registry.suite_records import Suite
from ray_jobs.base import base_config, base_model
from ray_jobs.base.batching import TokenizedSplit, tokenize
from ray_jobs.base.chat_format import ChatFormat, without_reasoning
from ray_jobs.scoring import checks
from ray_jobs.scoring.earlier import measured_before, on_the_first_base
from ray_jobs.scoring.texts import dealt_back
from ray_jobs.scoring.tool_calls import Calls, offered

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

AMPLE = 4096
"""Tokens of the longest question, where the base sets no limit."""

Passes = Callable[[str, Mapping[str, Any]], bool]
Answers = Mapping[Role, Mapping[str, Sequence[str]]]
"""Who said what, by suite, to the questions of a worker's share."""


@dataclass(frozen=True)
class Asked:
    """One suite, and whom it is still to be put to."""

    split: TokenizedSplit
    roles: frozenset[Role]
    max_new_tokens: int
    known: Suite
    """What is there already; all there is of one that is left out."""


@dataclass(frozen=True)
class Questions:
    """All suites that a run asks for."""

    suites: tuple[Asked, ...]

    def share(self, index: int, of: int) -> "Questions":
        """Every `of`-th question of each suite, from `index` on."""
        return self.at(lambda count: range(index, count, of))

    def at(self, rows: Callable[[int], Sequence[int]]) -> "Questions":
        """Of each suite the questions at these places."""
        return replace(
            self, suites=tuple(replace(each, split=each.split.take(rows(len(each.split)))) for each in self.suites)
        )

    def num_items(self, name: str) -> int:
        """Of one suite."""
        return next(len(each.split) for each in self.suites if each.known.name == name)

    def answers(self, role: Role, model: Any, chat: ChatFormat, batch_size: int) -> dict[str, list[str]]:
        """The greedy answers of a model, in evaluation mode, to what it is still to be asked."""
        from ray_jobs.scoring.generation import greedy

        return {
            each.known.name: [
                without_reasoning(text) for text in greedy(model, chat, each.split, batch_size, each.max_new_tokens)
            ]
            for each in self.suites
            if role in each.roles
        }

    def judged(self, chat: ChatFormat, shares: Sequence[Answers]) -> tuple[Suite, ...]:
        """What is known once each share was answered."""
        return tuple(_judged(each, chat, shares) for each in self.suites)


NO_QUESTIONS = Questions(())


def to_ask(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence["Contender"]) -> Questions:
    """The suites of the config, for those who have not been asked yet.

    Of the versions of earlier runs, and of the base, it is known what those runs have found.
    """
    base_format, identity = config.method.row.base, contenders[0].base_identity
    ours = [each for each in on_the_first_base(contenders) if each.role in ROLES]
    if not config.evaluate.suites:
        return NO_QUESTIONS
    reach = _reach(config, contenders[0])
    asked = [_unasked(name, chat, base_format, reach) for name in dict.fromkeys(config.evaluate.suites)]
    for contender in ours:
        before = measured_before(store, contender)
        if before is not None:
            same_base = before.base.get("identity") == identity
            asked = [_with_known(each, contender.role, before, same_base=same_base) for each in asked]
    roles = {each.role for each in ours}
    return Questions(
        tuple(
            replace(each, roles=frozenset(roles - each.known.passes.keys() if len(each.split) else ()))
            for each in asked
        )
    )


def passing(name: str, chat: ChatFormat) -> Passes:
    """What makes an answer pass in this suite, given the item that was asked."""
    if name == "tool_calls":
        calls = Calls.of(chat, shipped()[name]["tools"])
        assert calls is not None  # else the suite is left out
        return lambda answer, item: calls.is_right(answer, item["call"])
    rules: dict[str, Passes] = {
        "instructions": lambda answer, item: checks.constraints_kept(answer, item["checks"]),
        "json": lambda answer, item: checks.fits_schema(answer, item["schema"]),
        "refusal": lambda answer, _: checks.refuses(answer),
        "over_refusal": lambda answer, _: checks.complies(answer),
    }
    return rules[name]


@cache
def shipped() -> dict[str, Any]:
    """The suites that come with Fineloop."""
    found = json.loads(resources.files(__package__).joinpath("suites.json").read_text(encoding="utf-8"))
    return dict(found["suites"])


def _unasked(name: SuiteName, chat: ChatFormat, base_format: str, reach: int) -> Asked:
    """A suite that nobody was asked, or that is left out."""
    suite = shipped()[name]
    tools, most = suite.get("tools", {}), suite["max_new_tokens"]
    records = [
        Record(
            str(place),
            [Message("user", item["prompt"])],
            "-",  # what no answer is compared with
            tools=offered(tools, item["tools"]) if "tools" in item else "",
        )
        for place, item in enumerate(suite["items"])
    ]
    left_out = ""
    if tools and Calls.of(chat, tools) is None:
        left_out = "the base's chat template takes no tools"
    else:
        split = tokenize(records, chat, AMPLE)
        if split.too_long or split.cut or int(split.num_prompt_tokens.max()) + most > reach:
            left_out = f"its questions and answers do not fit into the {reach} positions of the base"
    if left_out:
        split = tokenize([], chat, AMPLE)
    digest = hashlib.sha256(split.tokens.tobytes() + split.offsets.tobytes())
    digest.update(json.dumps([checks.VERSION, most, suite["items"]], sort_keys=True).encode())
    known = Suite(
        name=name,
        title=suite["title"],
        meaning=suite["meaning"],
        sha256=digest.hexdigest(),
        base_format=base_format,
        items=len(split),
        left_out=left_out,
        passes={},
    )
    return Asked(split, frozenset(), most, known)


def _judged(asked: Asked, chat: ChatFormat, shares: Sequence[Answers]) -> Suite:
    name = asked.known.name
    if not asked.roles:
        return asked.known
    items, passes = shipped()[name]["items"], passing(name, chat)
    said = {role: dealt_back([share[role][name] for share in shares]) for role in ROLES if role in asked.roles}
    found: dict[str, list[bool]] = {
        role: [passes(answer, item) for answer, item in zip(answers, items, strict=True)]
        for role, answers in said.items()
    }
    return asked.known.with_answers(
        {**asked.known.passes, **found}, said.get("candidate"), [item["prompt"] for item in items]
    )


def _with_known(asked: Asked, role: Role, before: Evaluation, *, same_base: bool) -> Asked:
    """With what an earlier run, whose candidate is this one's `role`, has found in the same suite."""
    known = next((each for each in before.suites if each.sha256 == asked.known.sha256 and not each.left_out), None)
    if known is None:
        return asked
    passes = dict(asked.known.passes)
    if "candidate" in known.passes:
        passes[role] = known.passes["candidate"]
    if "base" in known.passes and same_base and known.base_format == asked.known.base_format:
        passes["base"] = known.passes["base"]
    return replace(asked, known=asked.known.model_copy(update={"passes": passes}))


def _reach(config: RunConfig, base: "Contender") -> int:
    found = base_model.resolve(config.model, recorded=base.base_identity)
    return base_config.positions(base_config.load(found.path, config.model)) or AMPLE
