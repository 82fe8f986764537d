"""Counts of the decisions made on a test set, and the confidence and the fold for the next decision; pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.registry.event_log import changed_nothing

if TYPE_CHECKING:
    from components.registry.event_log import Event

SAME = 0.5
"""Share of its sample that a test set has in common with itself after a refresh, at least."""


def decided_before(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    counts: Callable[["Event"], bool] = lambda event: True,
) -> list["Event"]:
    """Return the event about the outcome of each run other than `run_id` on this test set, oldest first.

    `test_set` is the sample of the test set that an evaluation names; without it, earlier decisions are unknown.
    `counts` tells whether there is a decision behind an event: a training may write events too.
    """
    return _of_other_runs(_about(log, alias, test_set), run_id, counts)


def passes(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    counts: Callable[["Event"], bool] = lambda event: True,
) -> int:
    """Return how many of the earlier decisions replaced one version by another, by the gate's own rules."""
    moved = [each for each in _about(log, alias, test_set) if each.kind == "promoted" and each.body.get("from")]
    return len(_of_other_runs(moved, run_id, counts))


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


def _of_other_runs(events: Sequence["Event"], run_id: str, counts: Callable[["Event"], bool]) -> list["Event"]:
    """Return the first event of each other run that counts; one that does not must not hide one that does."""
    by_run: dict[str, Event] = {}
    for event in events:
        other = str(event.body.get("run_id", ""))
        if other != run_id and other not in by_run and counts(event):
            by_run[other] = event
    return list(by_run.values())


def _sample(body: Mapping[str, Any]) -> set[str]:
    """Return the sample of the test set: it is in the body of a refusal, and in the evidence of a promotion."""
    return set(body.get("test_set") or body.get("evidence", {}).get("test_set") or ())
