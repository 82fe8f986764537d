"""How often a test set was used to decide, and the confidence and the part that follow for the next decision; pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.registry.history import changed_nothing

if TYPE_CHECKING:
    from components.registry.event import Event

SAME = 0.5
"""Share of its sample that two test sets have in common when one is the other after a refresh."""


def looks(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    has_decided: Callable[[str], bool] = lambda run_id: True,
) -> int:
    """How often the alias was decided on by this test set, with the decision of `run_id`; 1 is the first time.

    `test_set` is the sample of it that an evaluation names; without it, earlier looks are unknown.
    `has_decided` says of a run that an event names whether it made a decision: a training may write events too.
    """
    return sum(map(has_decided, runs_before(log, alias, test_set, run_id=run_id))) + 1


def runs_before(log: Sequence["Event"], alias: str, test_set: Sequence[str], *, run_id: str) -> list[str]:
    """The runs, but for `run_id`, of which an event says that they came to something on this test set, oldest first."""
    return [each for each in _runs(_about(log, alias, test_set)) if each != run_id]


def passes(
    log: Sequence["Event"],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    has_promoted: Callable[[str], bool] = lambda run_id: True,
) -> int:
    """How many of those earlier decisions let a version take the place of another, by the gate's own rules."""
    moved = [each for each in _about(log, alias, test_set) if each.kind == "promoted" and each.body.get("from")]
    return sum(has_promoted(each) for each in _runs(moved) if each != run_id)


def next_part(decided: Sequence[int], *, enough: int) -> int:
    """Which of the parts of a test set is used, by how often each was decided by: the first not seen `enough`, so that
    those after it lie in reserve, or else the one seen least."""
    return min(range(len(decided)), key=lambda part: (max(decided[part], enough - 1), part))


def confidence_at(look: int, confidence: float, passed: int = 0) -> float:
    """How sure the k-th look has to be, after so many that passed: LOND, with 1 / (k (k + 1)) as its sequence.

    Of all that pass on a test set, however many looks there will be, the expected share that ought not to is at most
    the error rate of one look (Javanmard and Montanari, arXiv:1502.06197; of looks that depend on each other
    positively, as those at the same records do, Zrnic, Ramdas and Jordan, arXiv:1812.05068). While one or none has
    passed, all looks together have that error rate.
    """
    return 1 - (1 - confidence) * max(passed, 1) / (look * (look + 1))


def _about(log: Sequence["Event"], alias: str, test_set: Sequence[str]) -> list["Event"]:
    """The events about decisions on the alias by this test set."""
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
    """Of a refusal it stands in the event, of a promotion in its evidence."""
    return set(body.get("test_set") or body.get("evidence", {}).get("test_set") or ())
