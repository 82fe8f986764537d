"""A promotion or a rollback that a person asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.registry import aliases, event_log, versions
from components.registry.history import is_refused
from components.registry.records import finite
from components.shared.errors import UserError
from components.shared.metrics import Metric, metrics_of

if TYPE_CHECKING:
    from components.registry.event_log import Event
    from components.registry.store import Store


def promote_by_hand(
    store: "Store",
    reference: str,
    *,
    alias: str = aliases.PRODUCTION,
    expected: str | None = aliases.ANYONE,
    run_id: str = "",
    actor: str = "",
    reason: str = "",
) -> "Event":
    """Point the alias at the version that the reference means, whatever the gate said.

    The event is "overridden" when a gate refused the version for this alias, else "promoted". `run_id` is the run that
    the person started for it, if any, not the one that made the version: what that promoted once and somebody rolled
    back, a person may promote again.

    Raises:
        UserError: the reference is malformed or ambiguous.
        ObjectMissing: there is no such version.
        AliasConflict: the alias is not at `expected`, or moved meanwhile.
    """
    version = versions.resolve(store, reference)
    refused = is_refused(event_log.events(store, version.name), version.version, alias)
    return aliases.promote(
        store,
        version.name,
        version.version,
        alias,
        expected=expected,
        kind="overridden" if refused else "promoted",
        cause=aliases.Cause(run_id, actor, reason),
    )


PROMOTE, ROLL_BACK = "promote", "roll back"


@dataclass(frozen=True)
class Request:
    """What a person filled in."""

    name: str
    action: str
    version: str
    """Empty: the newest one, or when rolling back the one that held the alias before."""
    alias: str
    reason: str
    person: str
    job_id: str
    """The Kubeflow run: a step that is run again goes back no further."""


def carry_out(store: "Store", request: Request) -> "Event":
    """Promote or roll back.

    Raises:
        UserError: the action is neither, or the reference fits no version.
        ObjectMissing: there is no such version, or nothing to go back to.
        AliasConflict: somebody moved the alias meanwhile.
    """
    actor = request.person or "Kubeflow UI"
    if request.action == ROLL_BACK:
        to = versions.resolve(store, f"{request.name}@{request.version}").version if request.version else None
        return aliases.rollback(
            store, request.name, request.alias, to, cause=aliases.Cause(request.job_id, actor, request.reason)
        )
    if request.action != PROMOTE:
        raise UserError(f"action is {request.action!r}: expected {PROMOTE!r} or {ROLL_BACK!r}")
    version = request.version or _newest(store, request.name)
    return promote_by_hand(
        store,
        f"{request.name}@{version}",
        alias=request.alias,
        run_id=request.job_id,
        actor=actor,
        reason=request.reason,
    )


def as_markdown(store: "Store", request: Request, event: "Event") -> str:
    """What was moved and what both versions had measured, for the Kubeflow UI."""
    before, after = event.body["from"], event.body["to"]
    measured = {
        version: versions.evaluated(store, versions.resolve(store, f"{request.name}@{version}")).metrics
        for version in (before, after)
        if version
    }
    lines = [
        f"# {request.name}@{request.alias} is now {after}",
        "",
        f"It was {before or 'empty'}. {event.kind.replace('_', ' ').capitalize()} by {event.body['actor']}"
        f"{f': {reason}' if (reason := event.body['reason']) else ''}.",
        "",
        f"| | {' | '.join(measured)} |",
        f"|---|{'---|' * len(measured)}",
        *[
            f"| {metric.label} | {' | '.join(_shown(metric, metrics) for metrics in measured.values())} |"
            for metric in metrics_of({key for metrics in measured.values() for key in metrics})
        ],
    ]
    return "\n".join(lines) + "\n"


def _newest(store: "Store", name: str) -> str:
    found = versions.list_versions(store, name)
    if not found:
        raise UserError(f"adapter_name is {name!r}, which has no version: publish one first")
    return found[0].version


def _shown(metric: Metric, metrics: Mapping[str, float | None]) -> str:
    value = finite(metrics.get(metric.key))
    return "-" if value is None else metric.text(value)
