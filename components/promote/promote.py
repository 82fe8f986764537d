"""The ends of a run: the candidate takes the alias, or the alias stays where it is."""

from components.registry import aliases
from components.shared.step import Step


def promote(run: Step) -> str:
    """Point the alias at the candidate and return the promotion's event as a URI. Running it again changes nothing.

    Raises:
        AliasConflict: another version took the alias after the candidate was compared with its holder.
        ObjectMissing: the run has no decision, or the candidate is gone.
        IntegrityError: the candidate's files are not those of its manifest.
    """
    decision = run.store.get_json(f"runs/{run.run_id}/decision.json")
    name, version, alias = decision["adapter"], decision["version"], decision["alias"]
    event = aliases.promote(
        run.store,
        name,
        version,
        alias,
        expected=decision["champion"],
        run_id=run.run_id,
        actor="fineloop pipeline",
        reason="; ".join(decision["reasons"]),
        evidence={"decision": run.store.uri(f"runs/{run.run_id}/decision.json")},
    )
    run.result.update(event.move())
    run.say(f"{name}@{alias} is now {version}")
    return event.uri


def hold(run: Step) -> str:
    """Leave the alias alone and return the decision's URI; the gate has recorded the refusal."""
    decision = run.store.get_json(f"runs/{run.run_id}/decision.json")
    run.result.update(version=decision["version"], reasons=decision["reasons"])
    run.say(f"{decision['adapter']}@{decision['alias']} stays where it is: {'; '.join(decision['reasons'])}")
    return run.store.uri(f"runs/{run.run_id}/decision.json")
