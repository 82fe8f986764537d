"""The ends of a run: the candidate takes the alias, the alias stays where it is, or there was nothing new to train on.

A run with a decision has consumed its data, so that it advances the adapter's watermark.
"""

import os

from components.promote.announce import announce
from components.records import runs
from components.records.steps import Decision
from components.registry import aliases, between_runs, signing
from components.registry.event_log import Event
from components.shared.errors import DataError
from components.step.step import StepRun
from components.store.store import Store


def promote(step_run: StepRun, decision_sha256: str) -> str:
    """Point the alias at the candidate and return the promotion's event as a URI. Running it again changes nothing.

    `decision_sha256` is the hash of the decision that the gate wrote; no other is obeyed. The version is signed for the
    decision if the environment holds a key. Then the servers that the config names are notified.

    Raises:
        AliasConflict: another version took the alias after the candidate was compared with its holder.
        ObjectMissing: the run has no decision, or the candidate is gone.
        DataError: the decision is not to promote, or is about another run, adapter or alias.
        IntegrityError: the decision is not the gate's, or the candidate's files are not those of its manifest.
    """
    run_id, adapter = step_run.run_id, step_run.config.adapter
    decision = runs.read(step_run.store, run_id, Decision, sha256=decision_sha256)
    name, version, alias = decision.adapter, decision.version, decision.alias
    if not decision.promoted or version is None:
        raise DataError(f"the decision of run {run_id} is to {decision.decision}, so it promotes nothing")
    if (decision.run_id, name, alias) != (run_id, adapter.name, adapter.alias):
        raise DataError(
            f"the decision is about run {decision.run_id}, {name}@{alias}, and this is run {run_id}, "
            f"{adapter.name}@{adapter.alias}: run the gate again"
        )
    cause = " ".join(decision.reasons)
    event = take_alias(step_run.store, decision, decision_sha256, actor=aliases.PIPELINE, reason=cause)
    step_run.result.update(event.move())  # at once: the alias has moved, whatever fails from here on
    step_run.say(f"{name}@{alias} is now {version}")
    between_runs.advance_watermark(step_run.store, name, run_id)
    if outcomes := announce(step_run.config.announce, step_run.store, name, event, os.environ):
        step_run.result["announced"] = outcomes
    return event.uri


def take_alias(store: Store, decision: Decision, decision_sha256: str, *, actor: str, reason: str) -> Event:
    """Carry out a decision: sign its version if the environment holds a key, and point its alias at the version.

    Raises:
        AliasConflict: another version took the alias after the candidate was compared with its holder.
        ObjectMissing: the candidate is gone.
        IntegrityError: the candidate's files are not those of its manifest; or the registry trusts keys, and none of
            those for evaluations has signed what the decision rests on.
    """
    assert decision.version is not None
    name, version = decision.adapter, decision.version
    measured = signing.require_evaluated(store, name, version, decision.run_id, decision.evaluation_sha256)
    if key := signing.signer_from(os.environ):
        signing.sign(store, name, version, key, alias=decision.alias, decision=decision, manifest_sha256=measured)
    evidence = {
        "decision": store.uri(runs.key_of(store, decision.run_id, runs.DECISION)),
        "sha256": decision_sha256,
        "anchor": decision.anchor,
        "test_set": list(decision.test_set),
    }
    return aliases.promote(
        store,
        name,
        version,
        decision.alias,
        expected=decision.champion,
        cause=aliases.Cause(decision.run_id, actor, reason, evidence),
    )


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
