"""What an adapter's event log says of its past; pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.registry.aliases import Event

MOVE_KINDS = ("promoted", "overridden", "rolled_back")


def is_refused(log: Sequence["Event"], version: str, alias: str) -> bool:
    """Whether a gate refused the version for this alias."""
    return any(
        event.kind == "refused" and event.body.get("version") == version and event.body.get("alias") == alias
        for event in log
    )


def moves(log: Sequence["Event"], alias: str) -> list["Event"]:
    """The events that moved the alias, oldest first, as the log is."""
    return [event for event in log if event.kind in MOVE_KINDS and event.body["alias"] == alias]


def is_chain(moves: Sequence["Event"]) -> bool:
    """Whether each move begins where the one before it ended, and the first at an alias that was not there."""
    ends = [None, *(event.body["to"] for event in moves)]
    return bool(moves) and [event.body["from"] for event in moves] == ends[:-1]


def holders(moves: Sequence["Event"]) -> list[str]:
    """Versions that held the alias, oldest first, without those that were rolled back from."""
    held: list[str] = []
    for event in moves:
        version = event.body["to"]
        if event.kind == "rolled_back" and version in held:
            while held[-1] != version:
                held.pop()
        else:
            held.append(version)
    return held
