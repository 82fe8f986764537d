"""Reads an adapter's history from its event log; pure."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.registry.event import Event

MOVE_KINDS = ("promoted", "overridden", "rolled_back")


def is_held(log: Sequence["Event"], version: str, alias: str) -> bool:
    """Whether a gate refused the version for this alias, or left it to a person who has not approved it yet."""
    about = [event for event in log if event.body.get("version") == version and event.body.get("alias") == alias]
    about = [event for event in about if not changed_nothing(event)]
    if any(event.kind == "refused" for event in about):
        return True
    approved = any(event.kind == "promoted" and event.body["to"] == version for event in moves(log, alias))
    return not approved and any(event.kind == "proposed" for event in about)


def promotion(log: Sequence["Event"], run_id: str, alias: str) -> "Event | None":
    """The move that carried out the run's decision; None if none did."""
    carried_out = [event for event in moves(log, alias) if event.body.get("run_id") == run_id]
    return next((event for event in carried_out if event.body.get("evidence", {}).get("sha256")), None)


def decisions(log: Sequence["Event"]) -> dict[str, tuple[str, "Event"]]:
    """The decision of each run that a move carried out, or else that waits for a person: its sha256, and the event."""
    proposed = {
        str(event.body.get("run_id")): (str(event.body.get("decision_sha256")), event)
        for event in log
        if event.kind == "proposed"
    }
    moved = [(event.body.get("evidence", {}), event) for event in log if event.kind in MOVE_KINDS]
    return proposed | {
        PurePosixPath(evidence["decision"]).parent.name: (evidence["sha256"], event)
        for evidence, event in moved
        if {"decision", "sha256"} <= evidence.keys()
    }


def changed_nothing(event: "Event") -> bool:
    """Whether the candidate already held the alias: up to release 0.1.0 a gate recorded that as a refusal."""
    version = event.body.get("version")
    return event.kind == "refused" and version is not None and version == event.body.get("champion")


def is_override(log: Sequence["Event"], version: str, alias: str) -> bool:
    """Whether going back to the version overrides a gate: the gate holds it back, and it never held the alias."""
    return is_held(log, version, alias) and all(event.body["to"] != version for event in moves(log, alias))


def waiting(log: Sequence["Event"], holders: Mapping[str, str]) -> set[str]:
    """The versions that a gate left to a person, who may still approve them, because the version that they were
    compared with still holds the alias. `holders` are versions by alias."""
    proposed = [event.body for event in log if event.kind == "proposed"]
    return {
        str(body.get("version")) for body in proposed if body.get("champion") == holders.get(str(body.get("alias")))
    }


def moves(log: Sequence["Event"], alias: str) -> list["Event"]:
    """The events that moved the alias, in the order of the log, oldest first."""
    return [event for event in log if event.kind in MOVE_KINDS and event.body["alias"] == alias]


def is_chain(moves: Sequence["Event"]) -> bool:
    """Whether each move begins where the one before it ended and names it, and the first began without an alias.

    The moves of release 0.1.0 do not name the one before; after a move that does, all do.
    """
    if not moves or moves[0].body["from"] is not None or moves[0].body.get("previous") is not None:
        return False
    return all(
        later.body["from"] == earlier.body["to"]
        and (
            later.body["previous"] == earlier.reference if "previous" in later.body else "previous" not in earlier.body
        )
        for earlier, later in pairwise(moves)
    )


def standing(moves: Sequence["Event"]) -> list["Event"]:
    """The moves that are not rolled back, oldest first; a rollback drops the moves after the one that it returns to."""
    held: list[Event] = []
    for event in moves:
        version = event.body["to"]
        if event.kind == "rolled_back" and any(earlier.body["to"] == version for earlier in held):
            while held[-1].body["to"] != version:
                held.pop()
        else:
            held.append(event)
    return held
