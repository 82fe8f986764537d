"""The ends of a run: the candidate takes the alias, the alias stays where it is, or there was nothing new to train on.

A run with a decision has consumed its data, so that it advances the adapter's watermark.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.handover.announce import announce
from components.records import runs
from components.records.steps import Decision, finite
from components.registry import aliases, between_runs, signing, versions
from components.registry.event_log import Event, is_held, is_override
from components.shared.errors import DataError, IntegrityError, UserError
from components.shared.metrics import metrics_of
from components.step.step import StepRun
from components.store.store import Store


def carry_out_decision(step_run: StepRun, decision_sha256: str) -> str:
    """Point the alias at the candidate that the gate let pass, advance the watermark past the data of its run, notify
    the servers that the config names, and return the promotion's event as a URI. Running it again changes nothing.

    `decision_sha256` is the hash of the decision that the gate wrote; no other is obeyed.

    Raises:
        DataError: the decision is not to promote, or is about another run, adapter or alias.
        IntegrityError: the decision is not the gate's; or as `take_alias` raises.
        AliasConflict: another version took the alias after the candidate was compared with its holder.
    """
    store, run_id, adapter = step_run.store, step_run.run_id, step_run.config.adapter
    decision = runs.read(store, run_id, Decision, sha256=decision_sha256)
    name, alias = decision.adapter, decision.alias
    if not decision.promoted or decision.version is None:
        raise DataError(f"the decision of run {run_id} is to {decision.decision}, so it promotes nothing")
    if (decision.run_id, name, alias) != (run_id, adapter.name, adapter.alias):
        raise DataError(
            f"the decision is about run {decision.run_id}, {name}@{alias}, and this is run {run_id}, "
            f"{adapter.name}@{adapter.alias}: run the gate again"
        )
    event = take_alias(store, decision, decision_sha256, actor=aliases.PIPELINE, reason=" ".join(decision.reasons))
    step_run.result.update(event.move())  # at once: the alias has moved, whatever fails from here on
    step_run.say(f"{name}@{alias} is now {decision.version}")
    between_runs.advance_watermark(store, name, run_id)
    if outcomes := announce(step_run.config.announce, store, name, event, os.environ):
        step_run.result["announced"] = outcomes
    return event.uri


def take_alias(store: Store, decision: Decision, decision_sha256: str, *, actor: str, reason: str) -> Event:
    """Point the decision's alias at its version, which is signed for it if the environment holds a key.
    `decision_sha256` is that of the decision as it is stored.

    Raises:
        AliasConflict: another version took the alias after this one was compared with its holder.
        IntegrityError: the registry trusts keys, and none for evaluations has signed what the decision rests on; or the
            version's files are not those of its manifest, or it is not signed where that is needed.
    """
    assert decision.version is not None
    name, version, alias = decision.adapter, decision.version, decision.alias
    measured = signing.require_evaluated(store, name, version, decision.run_id, decision.evaluation_sha256)
    if key := signing.signer_from(os.environ):
        signing.sign(store, name, version, key, alias=alias, decision=decision, manifest_sha256=measured)
    evidence = {
        "decision": store.uri(runs.key_of(store, decision.run_id, runs.DECISION)),
        "sha256": decision_sha256,
        "anchor": decision.anchor,
        "test_set": list(decision.test_set),
    }
    cause = aliases.Cause(decision.run_id, actor, reason, evidence)
    return aliases.promote(store, name, version, alias, expected=decision.champion, cause=cause)


def hold(step_run: StepRun) -> str:
    """Leave the alias alone and return the decision's URI; the gate has recorded the refusal."""
    decision = runs.read(step_run.store, step_run.run_id, Decision)
    between_runs.advance_watermark(step_run.store, decision.adapter, step_run.run_id)
    step_run.result.update(version=decision.version, reasons=list(decision.reasons))
    step_run.say(f"{decision.adapter}@{decision.alias} stays where it is: {' '.join(decision.reasons)}")
    return step_run.store.uri(runs.key_of(step_run.store, step_run.run_id, runs.DECISION))


def skip(step_run: StepRun) -> str:
    """Leave everything alone and return the decision's URI. The watermark stays, so that new rows stay new."""
    decision = runs.read(step_run.store, step_run.run_id, Decision, to_show=True)
    step_run.result.update(reasons=list(decision.reasons))
    step_run.say(f"{decision.adapter} is not trained: {' '.join(decision.reasons)}")
    return step_run.store.uri(runs.run_key(step_run.run_id, runs.DECISION))


def roll_back_worse(step_run: StepRun, version: str, reason: str) -> str:
    """Return the alias to the version before `version`, which a look found to be worse, and announce it; returns the
    event as a URI. Running it again changes nothing. Raises AliasConflict: another version took the alias since the
    look; IntegrityError: the version before is damaged, or signed by none of the keys that the registry trusts."""
    name, alias = step_run.config.adapter.name, step_run.config.adapter.alias
    cause = aliases.Cause(step_run.run_id, aliases.PIPELINE, reason)
    event = aliases.rollback(step_run.store, name, alias, expected=version, cause=cause)
    step_run.result.update(event.move())
    step_run.say(f"{name}@{alias} went back to {event.body['to']}")
    if outcomes := announce(step_run.config.announce, step_run.store, name, event, os.environ):
        step_run.result["announced"] = outcomes
    return event.uri


# A promotion, an approval or a rollback that a person asks for.


@dataclass(frozen=True)
class Person:
    """Who moves an alias, and why."""

    by: str = ""
    reason: str = ""
    otherwise: str = ""
    """The name to log if they gave none."""

    def cause(self, run_id: str, evidence: Mapping[str, Any] | None = None) -> aliases.Cause:
        return aliases.Cause(run_id, self.by or self.otherwise, self.reason, evidence or {})

    def require_name_and_reason(self, what: str) -> None:
        """Raise UserError if one of them is missing."""
        if not (self.by.strip() and self.reason.strip()):
            raise UserError(
                f"{what}: say who answers for it and why (--by and --reason; person and reason in the form)"
            )


def promote_by_hand(
    store: Store,
    reference: str,
    person: Person,
    *,
    alias: str = aliases.PRODUCTION,
    expected: str | None = aliases.ANYONE,
    run_id: str = "",
) -> Event:
    """Point the alias at the version that the reference means, whatever the gate said.

    The event is "overridden" if a gate holds the version back from this alias, which requires a name and a reason; else
    it is "promoted". `run_id` is the run that the person started for the move, if any, not the run that made the
    version: a person may promote again a version that its run promoted and that was rolled back. From then on the gate
    holds later candidates to this version as the best so far; the event names the earlier best as `anchor_before`.
    Raises UserError: the reference is malformed or ambiguous, or a gate is overridden without name or reason;
    AliasConflict: the alias is not at `expected`, or was moved at the same time.
    """
    version = versions.resolve(store, reference)
    overrides = is_held(signing.believed(store, version.name), version.version, alias)
    if overrides:
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
        kind="overridden" if overrides else "promoted",
        cause=person.cause(run_id, evidence),
    )


def approve(store: Store, reference: str, person: Person, *, alias: str = aliases.PRODUCTION) -> Event:
    """Approve a version, by carrying out the decision that left it to a person. Approving it again changes nothing.

    Raises:
        UserError: name or reason is missing, or the version does not wait for approval.
        IntegrityError: the decision is not the one that the gate made, or the version is damaged.
        AliasConflict: another version took the alias after this one was compared with its holder.
    """
    person.require_name_and_reason("an approval is a person's")
    version = versions.resolve(store, reference)
    about = {"version": version.version, "alias": alias}.items()
    events = [event for event in signing.believed(store, version.name) if about <= event.body.items()]
    proposals = [event.body for event in events if event.kind == "proposed"]
    if not proposals:
        raise UserError(
            f"{version.name} {version.version} does not wait for an approval to take {alias}: see `fineloop adapters "
            f"history {version.name}`; `fineloop adapters promote` points an alias at any version"
        )
    run_id, sha256 = (str(proposals[-1][key]) for key in ("run_id", "decision_sha256"))
    decision = runs.read(store, run_id, Decision, sha256=sha256)
    decided = (decision.adapter, decision.version, decision.alias)
    if not decision.waits or decided != (version.name, version.version, alias):
        raise IntegrityError(
            f"the log names a decision of run {run_id} that leaves {version.name} {version.version} and {alias} to a "
            f"person, and that one is to {decision.verdict or decision.decision} {decision.adapter} {decision.version} "
            f"at {decision.alias}"
        )
    return take_alias(store, decision, sha256, actor=person.by, reason=person.reason)


def roll_back_by_hand(
    store: Store,
    name: str,
    person: Person,
    *,
    alias: str = aliases.PRODUCTION,
    to: str | None = None,
    expected: str | None = aliases.ANYONE,
    run_id: str = "",
) -> Event:
    """Run `aliases.rollback` for a person, who must give a name and a reason if that overrides a gate. `to` may be the
    first digits of a version."""
    to = versions.resolve(store, f"{name}@{to}").version if to else None
    if to is not None and is_override(signing.believed(store, name), to, alias):
        person.require_name_and_reason(f"the gate holds {name} {to}, and this overrides it")
    return aliases.rollback(store, name, alias, to, expected=expected, cause=person.cause(run_id))


PROMOTE, APPROVE, ROLL_BACK = ACTIONS = ("promote", "approve", "roll back")


def carry_out(
    store: Store, name: str, action: str, person: Person, *, alias: str, version: str = "", run_id: str
) -> Event:
    """Promote, approve or roll back, as somebody asked in the form of the pipeline that moves an alias.

    An empty `version` means the newest, or for a rollback the one that held the alias before. `run_id` is the Kubeflow
    run's, so that a step that is run again does not roll back further.

    Raises UserError where the action is none of these or there is no version, and all that the three raise.
    """
    if action == ROLL_BACK:
        return roll_back_by_hand(store, name, person, alias=alias, to=version or None, run_id=run_id)
    if action not in ACTIONS:
        raise UserError(f"action is {action!r}: expected {PROMOTE!r}, {APPROVE!r} or {ROLL_BACK!r}")
    if not version:
        newest = versions.newest(store, name)
        if newest is None:
            raise UserError(f"adapter_name is {name!r}, which has no version: publish one first")
        version = newest.version
    if action == APPROVE:
        return approve(store, f"{name}@{version}", person, alias=alias)
    return promote_by_hand(store, f"{name}@{version}", person, alias=alias, run_id=run_id)


def as_markdown(store: Store, name: str, event: Event) -> str:
    """The move, with the metrics of both versions, as Markdown for the Kubeflow UI."""
    before, after, reason = (event.body[key] for key in ("from", "to", "reason"))
    measured = {
        version: versions.evaluated(store, versions.resolve(store, f"{name}@{version}")).metrics
        for version in (before, after)
        if version
    }
    lines = [
        f"# {name}@{event.body['alias']} is now {after}",
        "",
        f"It was {before or 'empty'}. {event.kind.replace('_', ' ').capitalize()} by {event.body['actor']}"
        f"{f': {reason}' if reason else ''}.",
        "",
        f"| | {' | '.join(measured)} |",
        f"|---|{'---|' * len(measured)}",
    ]
    for metric in metrics_of({key for metrics in measured.values() for key in metrics}):
        values = [finite(metrics.get(metric.key)) for metrics in measured.values()]
        texts = ["-" if value is None else metric.text(value) for value in values]
        lines.append(f"| {metric.label} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"
