"""The ends of a run: the candidate takes the alias, the alias stays where it is, or there was nothing new to train on.

A run that has decided has consumed its data: the adapter's watermark moves with it.
"""

from components.registry import aliases, runs, watermark
from components.registry.records import Decision
from components.shared.errors import DataError
from components.step.step import Step


def promote(run: Step) -> str:
    """Point the alias at the candidate and return the promotion's event as a URI. Running it again changes nothing.

    Raises:
        AliasConflict: another version took the alias after the candidate was compared with its holder.
        ObjectMissing: the run has no decision, or the candidate is gone.
        DataError: it was skipped, and there is no candidate.
        IntegrityError: the candidate's files are not those of its manifest.
    """
    decision = runs.read(run.store, run.run_id, Decision)
    name, version, alias = decision.adapter, decision.version, decision.alias
    if version is None:
        raise DataError(f"the decision of run {run.run_id} names no version to promote")
    event = aliases.promote(
        run.store,
        name,
        version,
        alias,
        expected=decision.champion,
        run_id=run.run_id,
        actor="fineloop pipeline",
        reason="; ".join(decision.reasons),
        evidence={"decision": _decision_uri(run)},
    )
    watermark.advance(run.store, name, run.run_id)
    run.result.update(event.move())
    run.say(f"{name}@{alias} is now {version}")
    return event.uri


def hold(run: Step) -> str:
    """Leave the alias alone and return the decision's URI; the gate has recorded the refusal."""
    decision = runs.read(run.store, run.run_id, Decision)
    watermark.advance(run.store, decision.adapter, run.run_id)
    run.result.update(version=decision.version, reasons=list(decision.reasons))
    run.say(f"{decision.adapter}@{decision.alias} stays where it is: {'; '.join(decision.reasons)}")
    return _decision_uri(run)


def skip(run: Step) -> str:
    """Leave everything alone and return the decision's URI; the watermark stays, so that what is new stays new."""
    decision = runs.read(run.store, run.run_id, Decision)
    run.result.update(reasons=list(decision.reasons))
    run.say(f"{decision.adapter} is not trained: {'; '.join(decision.reasons)}")
    return _decision_uri(run)


def _decision_uri(run: Step) -> str:
    return run.store.uri(runs.run_key(run.run_id, runs.DECISION))
