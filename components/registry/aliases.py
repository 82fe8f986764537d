"""Aliases and the event log of an adapter.

An alias is one small object that names a version and the sha256 of its manifest; it moves only by compare-and-swap.
The swap is the commit: the pointer carries the whole event that moved it, so when the writer dies before the event is
in the log, whoever runs the move again, or makes the next one, writes it. Events are never rewritten.
"""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from components.config.schema import Name
from components.registry.folders import now
from components.registry.history import MOVE_KINDS, holders, is_chain, is_refused, moves
from components.registry.identity import verify_whole
from components.registry.store import JSON, Store, decode_json, encode_json
from components.shared.errors import AliasConflict, Conflict, IntegrityError, ObjectMissing, UserError

logger = logging.getLogger(__name__)

EventKind = Literal["published", "promoted", "refused", "overridden", "rolled_back"]
MoveKind = Literal["promoted", "overridden", "rolled_back"]
PRODUCTION = "production"
ANYONE = "*"
"""For `promote`: take the alias from whoever holds it."""
FORMAT = 1
ID_LENGTH = 12
READS_AT_ONCE = 8
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True)
class Event:
    """One entry of an adapter's log."""

    id: str
    """Derived from kind and body, so that writing an event twice leaves one."""
    kind: EventKind
    time: str
    uri: str
    body: dict[str, Any]
    """A move holds alias, from, to, manifest_sha256, run_id, actor, reason and evidence."""

    def move(self) -> dict[str, str | None]:
        """What the command line prints of a promotion or a rollback."""
        return {"alias": self.body["alias"], "from": self.body["from"], "to": self.body["to"], "event_uri": self.uri}


@dataclass(frozen=True)
class Pointer:
    """What an alias points at, as read; `etag` is the token for the swap."""

    alias: str
    version: str
    manifest_sha256: str
    since: str
    run_id: str
    kind: MoveKind
    event: dict[str, Any]
    """Body of the event that moved the alias here."""
    etag: str


@dataclass(frozen=True)
class Cause:
    """Why an alias moves, and by whom; the event keeps all of it."""

    run_id: str = ""
    """The run that moves it; empty for a person."""
    actor: str = ""
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


NO_CAUSE = Cause()
_EVENT, _POINTER = TypeAdapter(Event), TypeAdapter(Pointer)


def adapter_key(name: str, *parts: str) -> str:
    """Key of an adapter's folder, or of something in it.

    Raises:
        UserError: the name is not one that adapter.name allows.
    """
    return "/".join(["adapters", checked_name(name, "adapter name"), *parts])


def version_key(name: str, version: str) -> str:
    """Key of a version's folder."""
    return adapter_key(name, "versions", version)


def checked_name(name: str, what: str) -> str:
    """The name itself.

    Raises:
        UserError: it holds anything but lower-case letters, digits, '.', '_' and '-', or is longer than 63 characters.
    """
    try:
        return _NAME.validate_python(name)
    except ValidationError as exc:
        raise UserError(
            f"{what} {name!r} is not allowed: at most 63 lower-case letters, digits, '.', '_' and '-', "
            "with a letter or digit at either end"
        ) from exc


def read_alias(store: Store, name: str, alias: str) -> Pointer | None:
    """Where the alias points, or None when it does not exist."""
    key = _alias_key(name, alias)
    found = store.read(key)
    if found is None:
        return None
    body, etag = found
    data = decode_json(body, store.uri(key))
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise IntegrityError(f"{store.uri(key)} is not an alias of format {FORMAT}: {body[:80]!r}")
    try:
        pointer = _POINTER.validate_json(encode_json({**data, "alias": alias, "etag": etag}), strict=True)
        datetime.fromisoformat(pointer.since)
        pointer.event["from"], pointer.event["to"]
    except (ValueError, KeyError) as exc:
        raise IntegrityError(f"{store.uri(key)} is not an alias: {' '.join(str(exc).split())}") from exc
    return pointer


def list_aliases(store: Store, name: str) -> list[Pointer]:
    """Every alias of the adapter, by name."""
    keys = [info.key for info in store.list(adapter_key(name, "aliases/"))]
    aliases = sorted(key.rpartition("/")[2].removesuffix(".json") for key in keys)
    return [pointer for alias in aliases if (pointer := read_alias(store, name, alias))]


def promote(
    store: Store,
    name: str,
    version: str,
    alias: str = PRODUCTION,
    *,
    expected: str | None = ANYONE,
    kind: MoveKind = "promoted",
    cause: Cause = NO_CAUSE,
) -> Event:
    """Point the alias at a version. Running it again once it succeeded changes nothing and gives the same event.

    A run promotes a version once: repeating it after somebody rolled that back is a conflict, not a second promotion.
    `expected` is the version that the candidate was compared with, None when there was none, ANYONE to ask nothing.

    Raises:
        ObjectMissing: there is no such version.
        IntegrityError: the version's files do not match its manifest.
        AliasConflict: another version than `expected` holds the alias or takes it meanwhile, or the run repeats itself.
    """
    holder = read_alias(store, name, alias)
    held = holder.version if holder else None
    if expected != ANYONE and held not in (expected, version):
        raise _conflict(store, name, alias, version, expected, holder)
    run_id = cause.run_id
    if run_id and held != version and (earlier := _promoted_before(store, name, alias, version, run_id)):
        raise _conflict(
            store, name, alias, version, version, holder, since=f"run {run_id} promoted it at {earlier.time}"
        )
    return move_alias(store, name, alias, version, expected=holder, kind=kind, cause=cause)


def rollback(
    store: Store,
    name: str,
    alias: str = PRODUCTION,
    to: str | None = None,
    *,
    expected: str | None = ANYONE,
    cause: Cause = NO_CAUSE,
) -> Event:
    """Point the alias back at `to`, or else at the version that held it before the present one.

    A second rollback goes one further back, not forward again, and needs the event log. With a `cause.run_id`, or with
    the version that is `expected` to hold the alias, repeating a rollback changes nothing. The event is "overridden"
    when a gate refused `to` for this alias and it never held it.

    Raises:
        ObjectMissing: the alias does not exist, or nothing held it before.
        IntegrityError: the event log does not lead to where the alias is, or the version is damaged.
        AliasConflict: another version than `expected` holds the alias, or somebody moved it meanwhile.
    """
    holder = read_alias(store, name, alias)
    if holder is None:
        raise ObjectMissing(f"{name} has no alias {alias!r} to roll back: promote a version first")
    is_there = holder.version == to if to else holder.kind == "rolled_back"
    is_ours = (bool(cause.run_id) and holder.run_id == cause.run_id) or holder.event["from"] == expected
    kind: MoveKind = "rolled_back"
    if is_there and is_ours:
        to = holder.version
    elif expected not in (ANYONE, holder.version):
        raise _conflict(store, name, alias, to or "the one before", expected, holder)
    elif to is None:
        to = _before(store, name, holder)
        if to is None:
            raise ObjectMissing(f"nothing held {name}@{alias} before {holder.version}: name a version with --to")
    elif is_refused(log := events(store, name), to, alias) and all(
        event.body["to"] != to for event in moves(log, alias)
    ):
        kind = "overridden"
    return move_alias(store, name, alias, to, expected=holder, kind=kind, cause=cause)


def move_alias(
    store: Store,
    name: str,
    alias: str,
    version: str,
    *,
    expected: Pointer | None,
    kind: MoveKind,
    cause: Cause,
) -> Event:
    """Move the alias from `expected` (None: it does not exist yet) to a version that is whole, every byte read.

    An alias that points there already is left alone, and its event completed when it is missing.

    Raises:
        ObjectMissing: there is no such version.
        IntegrityError: the version is damaged, or not the adapter that its id says.
        AliasConflict: the alias is no longer where `expected` says; carries who holds it now.
    """
    holder = read_alias(store, name, alias)
    if holder is not None and holder.version == version:
        return _record(store, name, holder)
    manifest = verify_whole(store, version_key(name, version))
    if expected is not None:
        _record(store, name, expected)  # the log must be whole before the pointer that could complete it is replaced
    body = {
        "alias": alias,
        "from": expected.version if expected else None,
        "to": version,
        "manifest_sha256": manifest.sha256,
        "run_id": cause.run_id,
        "actor": cause.actor,
        "reason": cause.reason,
        "evidence": dict(cause.evidence),
    }
    since = _after(expected.since) if expected else now()
    fields = {"version": version, "manifest_sha256": manifest.sha256, "since": since, "run_id": cause.run_id}
    pointer = encode_json({"format": FORMAT, **fields, "kind": kind, "event": body})
    key = _alias_key(name, alias)
    try:
        if expected is None:
            etag = store.create(key, pointer, content_type=JSON)
        else:
            etag = store.swap(key, pointer, expected.etag, content_type=JSON)
    except Conflict as exc:
        holder = read_alias(store, name, alias)
        if holder is not None and holder.version == version:  # another run of the same move won
            return _record(store, name, holder)
        raise _conflict(store, name, alias, version, expected.version if expected else None, holder) from exc
    logger.info("%s@%s: %s -> %s (%s)", name, alias, body["from"] or "nothing", version, kind)
    return _record(store, name, Pointer(alias, **fields, kind=kind, event=body, etag=etag))


def append_event(store: Store, name: str, kind: EventKind, body: Mapping[str, Any], *, at: str | None = None) -> str:
    """Add an event to the log and return its URI. An event of equal kind and body that is there already is left alone.

    `at` is the time to file it under, now when absent; whoever knows it makes a repetition cheap.
    """
    event_id = _event_id(kind, body)
    if at is None:
        for info in store.list(adapter_key(name, "events/")):
            if info.key.endswith(f"-{event_id}.json"):
                return store.uri(info.key)
        at = now()
    key = adapter_key(name, "events", f"{at.replace(':', '')}-{event_id}.json")
    record = {"format": FORMAT, "id": event_id, "kind": kind, "time": at, "adapter": name, "body": dict(body)}
    try:
        store.create(key, encode_json(record), content_type=JSON)
    except Conflict:
        logger.debug("%s is there already", store.uri(key))
    return store.uri(key)


def events(store: Store, name: str) -> list[Event]:
    """The adapter's log, oldest first. What lies there and is no event is named in a warning, and left out."""
    keys = sorted(info.key for info in store.list(adapter_key(name, "events/")))
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = [event for event in pool.map(lambda key: _read_event(store, key), keys) if event]
    first = {event.id: event for event in reversed(found)}  # two writers at once may have filed one event twice
    return sorted(first.values(), key=lambda event: (event.time, event.id))


def _read_event(store: Store, key: str) -> Event | None:
    try:
        event = _EVENT.validate_json(encode_json({**store.get_json(key), "uri": store.uri(key)}), strict=True)
        if event.id != _event_id(event.kind, event.body):
            raise ValueError("its id is not that of its content")
        if event.kind in MOVE_KINDS:
            event.body["alias"], event.body["from"], event.body["to"]
    except (IntegrityError, ValueError, TypeError, KeyError) as exc:
        logger.warning("%s is not an event, and passed over: %s", store.uri(key), " ".join(str(exc).split()))
        return None
    return event


def _record(store: Store, name: str, pointer: Pointer) -> Event:
    """The event that moved the alias to where `pointer` says, written when the log lacks it."""
    # `since` tells a move from an equal one made earlier: the same version promoted, rolled back, promoted again.
    body = {**pointer.event, "since": pointer.since}
    uri = append_event(store, name, pointer.kind, body, at=pointer.since)
    return Event(_event_id(pointer.kind, body), pointer.kind, pointer.since, uri, body)


def _before(store: Store, name: str, holder: Pointer) -> str | None:
    """Who held the alias before; the pointer says it, but of the one before a version that was rolled back to.

    Raises:
        IntegrityError: the log, which then has to tell, is not the whole way to the holder.
    """
    if holder.kind != "rolled_back":
        before: str | None = holder.event["from"]
        return before
    last = _record(store, name, holder)
    chain = moves(events(store, name), holder.alias)
    if not is_chain(chain) or chain[-1].id != last.id:
        raise IntegrityError(
            f"the events of {name}@{holder.alias} are not the whole way to {holder.version}, which holds it: one is "
            "missing, damaged or was added, so name the version to go back to with --to"
        )
    held = holders(chain)
    return held[-2] if len(held) > 1 else None


def _promoted_before(store: Store, name: str, alias: str, version: str, run_id: str) -> Event | None:
    wanted = {"alias": alias, "to": version, "run_id": run_id}.items()
    return next((event for event in events(store, name) if wanted <= event.body.items()), None)


def _conflict(
    store: Store,
    name: str,
    alias: str,
    version: str,
    expected: str | None,
    holder: Pointer | None,
    *,
    since: str = "",
) -> AliasConflict:
    by = f"{holder.version} since {holder.since} (run {holder.run_id or 'unknown'})" if holder else "nobody"
    conflict = AliasConflict(
        f"{name}@{alias} was expected to be held by {expected or 'nobody'}{since and f' ({since})'}, but it is held by "
        f"{by}: compare {version} with that one, then promote it by a run of its own"
    )
    if holder:
        conflict.holder = {name: getattr(holder, name) for name in ("alias", "version", "since", "run_id")}
    return conflict


def _after(time: str) -> str:
    """Now, or just after `time` where this clock is behind: moves of one alias sort as they happened."""
    earliest = datetime.fromisoformat(time) + timedelta(microseconds=1)
    return max(now(), earliest.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"))


def _event_id(kind: str, body: Mapping[str, Any]) -> str:
    return hashlib.sha256(encode_json([kind, dict(body)])).hexdigest()[:ID_LENGTH]


def _alias_key(name: str, alias: str) -> str:
    return adapter_key(name, "aliases", f"{checked_name(alias, 'alias')}.json")
