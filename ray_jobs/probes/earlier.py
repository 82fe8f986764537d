"""Reusing what earlier runs measured on this run's contenders, so that it is not measured again.

A contender on another base than the first one is left out: its tokens differ, and it never had the abilities and the
knowledge of that base.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from components.config.schema import RunConfig
from components.records.steps import Evaluation, Role
from components.registry.versions import evaluation
from components.shared.errors import IntegrityError
from components.store.store import Store
from ray_jobs.scoring.measure import Contender

T = TypeVar("T")
logger = logging.getLogger(__name__)


def on_the_first_base(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders that share the first one's base."""
    return [each for each in contenders if each.base_identity == contenders[0].base_identity]


def evaluations(store: Store, contenders: Sequence[Contender]) -> Iterator[tuple[Role, Evaluation, bool]]:
    """Yield each such contender's role, the evaluation of the run that trained it (as candidate), and whether that
    run's base is the same as this one's. Contenders without a complete evaluation are left out."""
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
    """Earlier runs' measurements, by the roles of this run. `found` returns the format of an earlier run's base and its
    measurements by that run's roles, or None if the run did not measure this."""
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
