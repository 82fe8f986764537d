"""A promotion, an approval or a rollback that a person asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.promote.promote import take_alias
from components.records import runs
from components.records.steps import Decision, finite
from components.registry import aliases, event_log, versions
from components.registry.event_log import is_held, is_override
from components.shared.errors import IntegrityError, UserError
from components.shared.metrics import Metric, metrics_of

if TYPE_CHECKING:
    from components.registry.event_log import Event
    from components.store.store import Store


@dataclass(frozen=True)
class Person:
    """Who moves an alias, and why."""

    by: str = ""
    """The name that they gave."""
    reason: str = ""
    otherwise: str = ""
    """The name to log if they gave none."""

    def cause(self, run_id: str, evidence: Mapping[str, Any] | None = None) -> aliases.Cause:
        """The cause of a move, for the log."""
        return aliases.Cause(run_id, self.by or self.otherwise, self.reason, evidence or {})

    def require_name_and_reason(self, what: str) -> None:
        """Require both.

        Raises:
            UserError: one of them is missing.
        """
        if not (self.by.strip() and self.reason.strip()):
            raise UserError(
                f"{what}: say who answers for it and why (--by and --reason; person and reason in the form)"
            )


def promote_by_hand(
    store: "Store",
    reference: str,
    person: Person,
    *,
    alias: str = aliases.PRODUCTION,
    expected: str | None = aliases.ANYONE,
    run_id: str = "",
) -> "Event":
    """Point the alias at the version that the reference means, whatever the gate said.

    The event is "overridden" if a gate holds the version back from this alias, which requires a name and a reason; else
    it is "promoted". `run_id` is the run that the person started for the move, if any, not the run that made the
    version: a person may promote again a version that its run promoted and that was rolled back. From then on the gate
    holds later candidates to this version as the best so far; the event names the earlier best as `anchor_before`.

    Raises:
        UserError: the reference is malformed or ambiguous, or a gate is overridden without name or reason.
        ObjectMissing: there is no such version.
        AliasConflict: the alias is not at `expected`, or was moved at the same time.
    """
    version = versions.resolve(store, reference)
    held = is_held(event_log.events(store, version.name), version.version, alias)
    if held:
        person.require_name_and_reason(f"the gate holds {version.name} {version.version}, and this overrides it")
    holder = aliases.read_alias(store, version.name, alias)
    evidence = {"anchor": version.version}
    before = holder and (holder.event.get("evidence", {}).get("anchor") or holder.version)
    if before and before != version.version:
        evidence["anchor_before"] = before
    return aliases.promote(
        store,
        version.name,
        version.version,
        alias,
        expected=expected,
        kind="overridden" if held else "promoted",
        cause=person.cause(run_id, evidence),
    )


def approve(store: "Store", reference: str, person: Person, *, alias: str = aliases.PRODUCTION) -> "Event":
    """Approve a version, by carrying out the decision that left it to a person. Approving it again changes nothing.

    Raises:
        UserError: name or reason is missing, or the version does not wait for approval.
        ObjectMissing: there is no such version, or its run's decision is gone.
        IntegrityError: the decision is not the one that the gate made, or the version is damaged.
        AliasConflict: another version took the alias after this one was compared with its holder.
    """
    person.require_name_and_reason("an approval is a person's")
    version = versions.resolve(store, reference)
    about = {"version": version.version, "alias": alias}.items()
    log = event_log.events(store, version.name)
    proposals = [event.body for event in log if event.kind == "proposed" and about <= event.body.items()]
    if not proposals:
        raise UserError(
            f"{version.name} {version.version} does not wait for an approval to take {alias}: see `fineloop adapters "
            f"history {version.name}`; `fineloop adapters promote` points an alias at any version"
        )
    run_id, sha256 = (str(proposals[-1][key]) for key in ("run_id", "decision_sha256"))
    decision = runs.read(store, run_id, Decision, sha256=sha256)
    if not decision.waits or (decision.adapter, decision.version, decision.alias) != (
        version.name,
        version.version,
        alias,
    ):
        raise IntegrityError(
            f"the log names a decision of run {run_id} that leaves {version.name} {version.version} and {alias} to a "
            f"person, and that one is to {decision.verdict or decision.decision} {decision.adapter} {decision.version} "
            f"at {decision.alias}"
        )
    return take_alias(store, decision, sha256, actor=person.by, reason=person.reason)


def roll_back_by_hand(
    store: "Store",
    name: str,
    person: Person,
    *,
    alias: str = aliases.PRODUCTION,
    to: str | None = None,
    expected: str | None = aliases.ANYONE,
    run_id: str = "",
) -> "Event":
    """Run `aliases.rollback` for a person, who gives a name and a reason if that overrides a gate. `to` may be the
    first digits of a version.

    Raises:
        UserError: `to` fits several versions, or is held back by a gate and never held the alias, and name or reason
            is missing.
        ObjectMissing, IntegrityError, AliasConflict: as `aliases.rollback`.
    """
    to = versions.resolve(store, f"{name}@{to}").version if to else None
    if to is not None and is_override(event_log.events(store, name), to, alias):
        person.require_name_and_reason(f"the gate holds {name} {to}, and this overrides it")
    return aliases.rollback(store, name, alias, to, expected=expected, cause=person.cause(run_id))


PROMOTE, APPROVE, ROLL_BACK = "promote", "approve", "roll back"
ACTIONS = (PROMOTE, APPROVE, ROLL_BACK)


@dataclass(frozen=True)
class Request:
    """A person's entries in the form of the pipeline that moves an alias."""

    name: str
    action: str
    version: str
    """The version; empty means the newest, or for a rollback the one that held the alias before."""
    alias: str
    reason: str
    person: str
    job_id: str
    """The id of the Kubeflow run, so that a step that is run again does not roll back further."""


def carry_out(store: "Store", request: Request) -> "Event":
    """Promote, approve or roll back, as the request says.

    Raises:
        UserError: the action is none of these, the reference fits no version, or a name or reason is missing.
        ObjectMissing: there is no such version, or nothing to go back to.
        AliasConflict: the alias was moved at the same time.
    """
    name, alias, run_id = request.name, request.alias, request.job_id
    person = Person(request.person, request.reason, otherwise="Kubeflow UI")
    if request.action == ROLL_BACK:
        return roll_back_by_hand(store, name, person, alias=alias, to=request.version or None, run_id=run_id)
    if request.action not in ACTIONS:
        raise UserError(f"action is {request.action!r}: expected {PROMOTE!r}, {APPROVE!r} or {ROLL_BACK!r}")
    reference = f"{name}@{request.version or _newest(store, name)}"
    if request.action == APPROVE:
        return approve(store, reference, person, alias=alias)
    return promote_by_hand(store, reference, person, alias=alias, run_id=run_id)


def as_markdown(store: "Store", request: Request, event: "Event") -> str:
    """The move, with the metrics of both versions, as Markdown for the Kubeflow UI."""
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
    found = versions.newest(store, name)
    if found is None:
        raise UserError(f"adapter_name is {name!r}, which has no version: publish one first")
    return found.version


def _shown(metric: Metric, metrics: Mapping[str, float | None]) -> str:
    value = finite(metrics.get(metric.key))
    return "-" if value is None else metric.text(value)
