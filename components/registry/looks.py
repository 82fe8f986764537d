"""Counts of the decisions made on a test set, and the confidence and the fold for the next decision; pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.registry.history import changed_nothing

if TYPE_CHECKING:
    from components.registry.event import Event

SAME = 0.5
"""Share of its sample that a test set has in common with itself after a refresh, at least."""


def looks(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    has_decided: Callable[[str], bool] = lambda run_id: True,
) -> int:
    """Return how often the alias was decided on by this test set, including the decision of `run_id`; 1 is the first.

    `test_set` is the sample of the test set that an evaluation names; without it, earlier looks are unknown.
    `has_decided` tells whether a run that an event names made a decision: a training may write events too.
    """
    return sum(map(has_decided, runs_before(log, alias, test_set, run_id=run_id))) + 1


def runs_before(log: Sequence["Event"], alias: str, test_set: Sequence[str], *, run_id: str) -> list[str]:
    """Return the runs other than `run_id` for which an event records an outcome on this test set, oldest first."""
    return [each for each in _runs(_about(log, alias, test_set)) if each != run_id]


def passes(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    has_promoted: Callable[[str], bool] = lambda run_id: True,
) -> int:
    """Return how many of the earlier decisions replaced one version by another, by the gate's own rules."""
    moved = [each for each in _about(log, alias, test_set) if each.kind == "promoted" and each.body.get("from")]
    return sum(has_promoted(each) for each in _runs(moved) if each != run_id)


def next_part(decided: Sequence[int], *, enough: int) -> int:
    """Return the fold of a test set to use next; `decided` counts the decisions made on each fold.

    It is the first fold with fewer than `enough` decisions, so that the folds after it stay in reserve, or else the
    one with the fewest.
    """
    return min(range(len(decided)), key=lambda part: (max(decided[part], enough - 1), part))


def confidence_at(look: int, confidence: float, passed: int = 0) -> float:
    """Return the confidence required of the k-th look, after `passed` passes: LOND, with 1 / (k (k + 1)) as sequence.

    The false discovery rate, the expected share of wrong passes among all passes on a test set, is at most the error
    rate of one look, however many looks there will be (Javanmard and Montanari, arXiv:1502.06197; for looks that depend
    on each other positively, as those at the same records do, Zrnic, Ramdas and Jordan, arXiv:1812.05068). While at
    most one look has passed, all looks together have that error rate.
    """
    return 1 - (1 - confidence) * max(passed, 1) / (look * (look + 1))


def _about(log: Sequence["Event"], alias: str, test_set: Sequence[str]) -> list["Event"]:
    """Return the events about decisions on the alias by this test set."""
    ours = set(test_set)
    return [
        event
        for event in log
        if event.body.get("alias") == alias
        and not changed_nothing(event)
        and ours
        and len(ours & _sample(event.body)) >= SAME * len(ours)
    ]


def _runs(events: Sequence["Event"]) -> list[str]:
    return list(dict.fromkeys(str(event.body.get("run_id", "")) for event in events))


def _sample(body: Mapping[str, Any]) -> set[str]:
    """Return the sample of the test set: it is in the body of a refusal, and in the evidence of a promotion."""
    return set(body.get("test_set") or body.get("evidence", {}).get("test_set") or ())
