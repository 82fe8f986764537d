"""A row of the list of all adapters: what is in production, the gate's last verdict, and the recent candidates."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from components.records import runs
from components.records.steps import Decision, RuleResult
from components.registry import event_log, versions
from components.registry.aliases import PRODUCTION, read_alias
from components.report.html import parse_moment, what, when
from components.shared.errors import IntegrityError
from components.shared.metrics import is_metric, metric_of

if TYPE_CHECKING:
    from components.registry.aliases import Pointer
    from components.registry.event_log import Event
    from components.store.store import Store

MOST_DECISIONS = 12
"""Maximum number of points of a sparkline."""
DECIDED = ("promoted", "refused", "proposed")


@dataclass(frozen=True)
class Sparkline:
    """The candidates' values of the metric that the gate compares by, oldest first, in a box of 100 by 24."""

    points: tuple[tuple[float, float], ...]
    text: str
    """Text alternative: what the picture shows."""
    ends: str


@dataclass(frozen=True)
class Listed:
    """An adapter in the list of adapters."""

    name: str
    in_production: str
    """The version in production, or the text to show in its place."""
    since: str
    """Since when it is in production, in UTC, as stored in the alias; empty if nothing is in production."""
    num_versions: int
    last: str = ""
    """What happened last, and when."""
    verdict: str = ""
    """Verdict of the last decision; empty if there is none."""
    run_id: str = ""
    """The run of the last decision."""
    sparkline: Sparkline | None = None

    def held(self, now: datetime | None = None) -> str:
        """Return for how long it has been in production, and since when."""
        return f"{age(self.since, now or datetime.now(UTC))}, since {when(self.since)}" if self.since else ""


def list_adapter(store: "Store", name: str) -> Listed:
    """Read what the list shows of the adapter; a damaged alias is shown as damaged."""
    log, num_versions = event_log.events(store, name), len(versions.version_ids(store, name))
    pointer, is_damaged = None, False
    try:
        pointer = read_alias(store, name, PRODUCTION)
    except IntegrityError:
        is_damaged = True

    def decisions(run_ids: Sequence[str]) -> list[Decision]:
        with ThreadPoolExecutor(MOST_DECISIONS) as pool:
            return [
                found
                for found in pool.map(lambda run_id: runs.decision_of(store, run_id, to_show=True), run_ids)
                if found
            ]

    found = listed(name, log, num_versions, pointer, decisions)
    return replace(found, in_production="unknown: the alias is damaged") if is_damaged else found


def listed(
    name: str,
    log: "Sequence[Event]",
    num_versions: int,
    pointer: "Pointer | None",
    decisions_of: Callable[[Sequence[str]], Sequence[Decision]],
) -> Listed:
    """Return what the list shows of an adapter. `log` is its newest events, oldest first; `decisions_of` returns the
    decisions of runs, in the runs' order, without missing or damaged ones."""
    decisions = decisions_of(_decided(log))
    return Listed(
        name,
        in_production=pointer.version if pointer else "nothing",
        since=pointer.since if pointer else "",
        num_versions=num_versions,
        last=f"{what(log[-1].kind, log[-1].body)}, {when(log[-1].time)}" if log else "",
        verdict=decisions[-1].verdict or decisions[-1].decision if decisions else "",
        run_id=decisions[-1].run_id if decisions else "",
        sparkline=sparkline(decisions),
    )


def age(since: str, now: datetime) -> str:
    """Return how long ago `since` was, in whole days; empty if the time cannot be parsed."""
    began = parse_moment(since)
    if began is None:
        return ""
    days = max((now - began).days, 0)
    return "for less than a day" if days == 0 else f"for {days} day{'s' if days > 1 else ''}"


def sparkline(decisions: Sequence[Decision]) -> Sparkline | None:
    """Return a sparkline of the decisions made by the newest one's metric; None if there are fewer than two."""
    rules = [rule for each in decisions if (rule := _judged(each))]
    rules = [rule for rule in rules if rule.metric == rules[-1].metric]
    if len(rules) < 2:
        return None
    metric, values = metric_of(rules[0].metric or ""), [rule.candidate or 0.0 for rule in rules]
    low, span = min(values), (max(values) - min(values)) or 1.0
    points = tuple(
        (round(3 + 94 * place / (len(values) - 1), 1), round(21 - 18 * (value - low) / span, 1))
        for place, value in enumerate(values)
    )
    ends = f"{metric.label} {metric.text(values[0])} to {metric.text(values[-1])}"
    better = "lower" if metric.lower_is_better else "higher"
    return Sparkline(points, f"The last {len(values)} candidates: {ends}; {better} is better.", ends)


def _judged(decision: Decision) -> RuleResult | None:
    """Return the rule that compared candidates by the policy's metric."""
    found = (each for each in decision.rules if each.against and is_metric(each.metric) and each.candidate is not None)
    return next(found, None)


def _decided(log: Sequence["Event"]) -> list[str]:
    """Return the newest runs that decided on production, oldest first."""
    decided = (
        each.body.get("run_id")
        for each in log
        if each.kind in DECIDED and each.body.get("alias", PRODUCTION) == PRODUCTION
    )
    return [run_id for run_id in dict.fromkeys(decided) if run_id][-MOST_DECISIONS:]
