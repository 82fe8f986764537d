"""The moves beneath an alias's current move: the one that a rollback returns to, then the one for the next rollback."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from components.registry.event import Event
from components.registry.event_log import events, read_event
from components.registry.history import is_chain, moves, standing
from components.shared.errors import IntegrityError
from components.store.store import Store

logger = logging.getLogger(__name__)


def moves_beneath(
    store: Store, name: str, move: Event, known: Mapping[str, Event] = MappingProxyType({})
) -> Iterator[Event]:
    """Yield the moves that successive rollbacks from `move` return to; `known` are events by sha256.

    Raises:
        IntegrityError: one of them is damaged or gone.
    """
    while "beneath" in move.body:
        beneath = move.body["beneath"]
        if beneath is None:
            return
        try:
            move = known.get(beneath["sha256"]) or read_event(store, name, beneath)
        except IntegrityError as exc:
            raise IntegrityError(f"{exc}: name the version to go back to with --to") from exc
        yield move
    log = moves(events(store, name), move.body["alias"])
    chain = [event for event in log if event.time <= move.time]
    if not is_chain(chain) or chain[-1].id != move.id:
        raise IntegrityError(
            f"the events of {name}@{move.body['alias']} are not the whole path to {move.body['to']}: one is missing, "
            "damaged or was added, so name the version to go back to with --to"
        )
    yield from reversed(standing(chain)[:-1])


def move_beneath_to(store: Store, name: str, move: Event, to: str, log: Sequence[Event]) -> Event | None:
    """The first move beneath `move` that points at `to`; None if there is none, or the path to it is damaged."""
    try:
        known = {event.sha256: event for event in log}
        return next((event for event in moves_beneath(store, name, move, known) if event.body["to"] == to), None)
    except IntegrityError as exc:
        logger.warning("%s", exc)
        return None
