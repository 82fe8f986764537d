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
    ours = set(test_set)
    seen = {
        str(event.body.get("run_id", ""))
        for event in log
        if event.body.get("alias") == alias
        and not changed_nothing(event)
        and ours
        and len(ours & _sample(event.body)) >= SAME * len(ours)
    }
    return sum(has_decided(each) for each in seen - {run_id}) + 1


def next_part(decided: Sequence[int], *, enough: int) -> int:
    """Which of the parts of a test set is used, by how often each was decided by: the first not seen `enough`, so that
    those after it lie in reserve, or else the one seen least."""
    return min(range(len(decided)), key=lambda part: (max(decided[part], enough - 1), part))


def confidence_at(look: int, confidence: float) -> float:
    """How sure the k-th look has to be, so that all of them together have the error rate of one.

    Each spends 1 / (k (k + 1)) of it: the sum over all looks is 1, however many there will be.
    """
    return 1 - (1 - confidence) / (look * (look + 1))


def _sample(body: Mapping[str, Any]) -> set[str]:
    """Of a refusal it stands in the event, of a promotion in its evidence."""
    return set(body.get("test_set") or body.get("evidence", {}).get("test_set") or ())
