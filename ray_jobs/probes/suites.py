"""Small sets of questions outside the domain, which show whether an adapter unlearns what its base can do.

suites.json holds them and names their authors. A question is formatted with the base's chat template and answered
greedily, by every model from the same tokens; plain functions say whether the answer passes (`checks`, `tool_calls`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from typing import Any

from components.config.schema import RunConfig, SuiteName
from components.prepare.dataset import Message, Record
from components.records.steps import ROLES, Evaluation, Role
from components.records.suites import Suite
from components.store.store import Store
from ray_jobs.base import base_config, base_model
from ray_jobs.probes import checks, earlier
from ray_jobs.probes.texts import in_order
from ray_jobs.probes.tool_calls import Calls, offered
from ray_jobs.scoring.contender import Contender
from ray_jobs.scoring.probe import Findings, Outcome, Rows, Subject
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat, without_reasoning

AMPLE = 4096
"""Maximum number of tokens of a question; also the context length assumed for a base that declares none."""

Passes = Callable[[str, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class PendingSuite:
    """One suite, and the roles that have not answered it yet."""

    split: TokenizedSplit
    roles: frozenset[Role]
    max_new_tokens: int
    known: Suite
    """The results that are already known; for a suite that is left out, nothing is added to them."""


@dataclass(frozen=True)
class Questions:
    """All suites that a run asks for."""

    suites: tuple[PendingSuite, ...]

    def at(self, rows: Rows) -> "Questions":
        """A worker's share: the questions of each suite at `rows`."""
        return replace(
            self, suites=tuple(replace(each, split=each.split.take(rows(len(each.split)))) for each in self.suites)
        )

    def held_together(self) -> "Questions":
        """The same questions: generation works with a sharded base too."""
        return self

    def run(self, subject: Subject, found: Findings) -> dict[str, list[str]]:
        """Generate a model's greedy answers to the suites that it has not answered yet, by suite."""
        from ray_jobs.scoring.generation import greedy

        return {
            each.known.name: [
                without_reasoning(text)
                for text in greedy(subject.model, subject.chat, each.split, subject.batch_size, each.max_new_tokens)
            ]
            for each in self.suites
            if subject.role in each.roles
        }

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        """Which model passes which question, in each suite."""
        record = tuple(_judged(each, chat, shares) for each in self.suites)
        return Outcome(record, lines=[suite.summary for suite in record])


def prepare(store: Store, chat: ChatFormat, config: RunConfig, contenders: Sequence[Contender]) -> Questions:
    """The suites of the config, for the roles that have not answered them yet.

    For the base and for versions of earlier runs, the results of those runs are reused.
    """
    if not config.evaluate.suites:
        return Questions(())
    base_format, reach = config.method.row.base, _reach(config, contenders[0], store)
    roles = {each.role for each in earlier.on_the_first_base(contenders) if each.role in ROLES}
    suites = []
    for name in dict.fromkeys(config.evaluate.suites):
        suite = _pending(name, chat, base_format, reach)
        passes = earlier.known(store, config, contenders, partial(_passes, suite.known.sha256))
        passes = {role: found for role, found in passes.items() if role in ROLES}
        left = roles - passes.keys() if len(suite.split) else ()
        known = suite.known.model_copy(update={"passes": passes})
        suites.append(replace(suite, roles=frozenset(left), known=known))
    return Questions(tuple(suites))


def passing(name: str, chat: ChatFormat) -> Passes:
    """The function that decides whether an answer passes in this suite, given its item."""
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


def _pending(name: SuiteName, chat: ChatFormat, base_format: str, reach: int) -> PendingSuite:
    """Prepare a suite that no model has answered yet, or one that is left out."""
    suite = shipped()[name]
    tools, most = suite.get("tools", {}), suite["max_new_tokens"]
    records = [
        Record(
            str(place),
            [Message("user", item["prompt"])],
            "-",  # a reference is required, but no answer is compared with it
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
    return PendingSuite(split, frozenset(), most, known)


def _judged(pending: PendingSuite, chat: ChatFormat, shares: Sequence[Findings]) -> Suite:
    name = pending.known.name
    if not pending.roles:
        return pending.known
    items, passes = shipped()[name]["items"], passing(name, chat)
    count = len(pending.split)
    said = {role: in_order([share[role][name] for share in shares], count) for role in ROLES if role in pending.roles}
    found: dict[str, list[bool]] = {
        role: [passes(answer, item) for answer, item in zip(answers, items, strict=True)]
        for role, answers in said.items()
    }
    return pending.known.with_answers(
        {**pending.known.passes, **found}, said.get("candidate"), [item["prompt"] for item in items]
    )


def _passes(sha256: str, before: Evaluation) -> tuple[str, Mapping[str, list[bool]]] | None:
    """The results of an earlier run in the same suite, with the format of its base; None where it has none."""
    known = next((each for each in before.suites if each.sha256 == sha256 and not each.left_out), None)
    return (known.base_format, known.passes) if known else None


def _reach(config: RunConfig, base: Contender, store: Store) -> int:
    found = base_model.resolve(config.model, recorded=base.base_identity, weights=False, registry=store)
    return base_config.positions(base_config.load(found.path, config.model)) or AMPLE
