"""What earlier runs have measured of this run's contenders, which then is not measured again.

A contender on another base than the first one is left out: its tokens differ, and it never had what that base can do
and knows.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from components.config.schema import RunConfig
from components.records.steps import Evaluation, Role
from components.registry.versions import evaluation
from components.shared.errors import IntegrityError
from components.store.store import Store
from ray_jobs.scoring.contender import Contender

T = TypeVar("T")
logger = logging.getLogger(__name__)


def on_the_first_base(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders on the base of the first one."""
    return [each for each in contenders if each.base_identity == contenders[0].base_identity]


def evaluations(store: Store, contenders: Sequence[Contender]) -> Iterator[tuple[Role, Evaluation, bool]]:
    """The role of each such contender, the evaluation of the run that made it, whose candidate it was, and whether
    that run's base was this one's. Those without an evaluation that is whole are left out."""
    for contender in on_the_first_base(contenders):
        if contender.version is None:
            continue
        try:
            before = evaluation(store, contender.version)
        except IntegrityError as exc:
            logger.info("%s: what it found is measured again", exc)
            continue
        if before is not None:
            yield contender.role, before, before.base.get("identity") == contenders[0].base_identity


def known(
    store: Store,
    config: RunConfig,
    contenders: Sequence[Contender],
    found: Callable[[Evaluation], tuple[str, Mapping[Any, T]] | None],
) -> dict[Role, T]:
    """What earlier runs found in each role of this one. `found` gives the format that such a run's base was in, and
    what it found by its own roles; None where it measured nothing of the kind."""
    result: dict[Role, T] = {}
    for role, before, same_base in evaluations(store, contenders):
        if (theirs := found(before)) is None:
            continue
        base_format, by_role = theirs
        if "candidate" in by_role:
            result[role] = by_role["candidate"]
        if "base" in by_role and same_base and base_format == config.method.row.base:
            result["base"] = by_role["base"]
    return result
