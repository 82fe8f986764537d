"""Aliases of an adapter, and how they move.

An alias is one small object that names a version and the sha256 of its manifest; it moves only by compare-and-swap.
The swap is the commit: the pointer carries the whole event that moved it, which the next move, or a repetition, writes
to the log if the writer died before. Each move names, by sha256, the previous one and the one that a rollback returns
to: so the pointer leads to that version.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from components.registry import event_log, signing
from components.registry.cache import changing
from components.registry.event_log import Body, Event, append_event, events, find_event, is_override
from components.registry.identity import adapter_key, checked_name, verify_whole, version_key
from components.registry.signing import require_signed
from components.shared.errors import AliasConflict, Conflict, IntegrityError, ObjectMissing, UnknownName, UserError
from components.store import folders
from components.store.folders import find_manifest, now
from components.store.store import JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

MoveKind = Literal["promoted", "overridden", "rolled_back"]
PRODUCTION = "production"
PIPELINE = "fineloop pipeline"
"""Actor of a move that the gate makes, not a person."""
ANYONE = "*"
"""Value of `expected` that takes the alias from any holder."""
FORMAT = 1


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
    """Why an alias moves, and who moves it; the event keeps all of it."""

    run_id: str = ""
    """The run that moves the alias; empty if a person does."""
    actor: str = ""
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


NO_CAUSE = Cause()
_POINTER = TypeAdapter(Pointer)


def read_alias(store: Store, name: str, alias: str) -> Pointer | None:
    """Read an alias; None if it does not exist."""
    key = _alias_key(name, alias)
    stored = store.read(key)
    if stored is None:
        return None
    data = decode_json(stored[0], store.uri(key))
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise IntegrityError(f"{store.uri(key)} is not an alias of format {FORMAT}: {stored[0][:80]!r}")
    try:
        pointer = _POINTER.validate_json(encode_json({**data, "alias": alias, "etag": stored[1]}), strict=True)
        datetime.fromisoformat(pointer.since)
        pointer.event["from"]
        Body.model_validate(pointer.event)
        if pointer.event["to"] != pointer.version:
            raise ValueError(f"it points at {pointer.version}, and its event at {pointer.event['to']}")
    except (ValueError, KeyError) as exc:
        raise IntegrityError(f"{store.uri(key)} is not an alias: {' '.join(str(exc).split())}") from exc
    return pointer


def list_aliases(store: Store, name: str, *, pass_over_damaged: bool = True) -> list[Pointer]:
    """Read every alias of the adapter, by name; objects that are not named like an alias are left out. Raises
    IntegrityError if an alias is damaged, and `pass_over_damaged`, which leaves it out with a warning, is False."""
    pointers = []
    for info in store.list(adapter_key(name, "aliases/")):
        alias = info.key.rpartition("/")[2].removesuffix(".json")
        try:
            if info.key == _alias_key(name, alias) and (pointer := read_alias(store, name, alias)):
                pointers.append(pointer)
        except UserError as exc:
            logger.warning("%s is no alias: %s", store.uri(info.key), exc)
        except IntegrityError as exc:
            if not pass_over_damaged:
                raise
            logger.warning("%s", exc)
    return pointers


def last_move(store: Store, name: str, alias: str = PRODUCTION) -> Event:
    """Return the event of the alias's last move, and write it if the log lacks it. Raises UnknownName if the alias does
    not exist."""
    pointer = read_alias(store, name, alias)
    if pointer is None:
        raise UnknownName(f"{name} has no alias {alias!r}: promote a version first")
    return _logged(store, name, pointer)


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

    A run promotes a version once: repeating it after a rollback is a conflict, not a second promotion. `expected` is
    the version that the candidate was compared with, None when there was none, ANYONE to skip the check. Raises
    ObjectMissing if there is no such version; IntegrityError if the version's files do not match its manifest;
    AliasConflict if another version than `expected` holds the alias or takes it meanwhile, or the run repeats itself.
    """
    holder = read_alias(store, name, alias)
    current = holder.version if holder else None
    # Where the version is there already, a run may have met another one's move; a person only repeats their own.
    is_there = holder is not None and current == version and (bool(cause.run_id) or holder.event["from"] == expected)
    if expected not in (ANYONE, current) and not is_there:
        raise _conflict(name, alias, version, expected, holder)
    if cause.run_id and current != version:
        same = {"alias": alias, "to": version, "run_id": cause.run_id}.items()
        if earlier := next((event for event in events(store, name) if same <= event.body.items()), None):
            since = f"run {cause.run_id} promoted it at {earlier.time}"
            raise _conflict(name, alias, version, version, holder, since=since)
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

    A second rollback goes one further back, not forward again. With a `cause.run_id`, or with the version that is
    `expected` to hold the alias, repeating a rollback changes nothing. The event is "overridden" when a gate holds `to`
    back from this alias, which `to` never held. Raises UnknownName if the alias does not exist, or nothing held it
    before; IntegrityError if the event that brought the version before is damaged or gone, or the version is;
    AliasConflict if another version than `expected` holds the alias, or it was moved at the same time.
    """
    holder = read_alias(store, name, alias)
    if holder is None:
        raise UnknownName(f"{name} has no alias {alias!r} to roll back: promote a version first")
    is_there = holder.version == to if to else holder.kind == "rolled_back"
    is_ours = (bool(cause.run_id) and holder.run_id == cause.run_id) or holder.event["from"] == expected
    kind: MoveKind = "rolled_back"
    back_to: Event | None = None
    if is_there and is_ours:
        to = holder.version
    elif expected not in (ANYONE, holder.version):
        raise _conflict(name, alias, to or "the one before", expected, holder)
    elif to is None:
        back_to = next(_moves_beneath(store, name, event_of(holder), []), None)
        if back_to is None:
            raise UnknownName(f"nothing held {name}@{alias} before {holder.version}: name a version with --to")
        to = str(back_to.body["to"])
    else:
        log = signing.believed(store, name)
        if is_override(log, to, alias):
            kind = "overridden"
        try:
            beneath = _moves_beneath(store, name, event_of(holder), log)
            back_to = next((event for event in beneath if event.body["to"] == to), None)
        except IntegrityError as exc:  # the path to it is damaged: a new move, on top of the others
            logger.warning("%s", exc)
    return move_alias(store, name, alias, to, expected=holder, kind=kind, cause=cause, back_to=back_to)


def _moves_beneath(store: Store, name: str, move: Event, log: Sequence[Event]) -> Iterator[Event]:
    """Yield the moves that successive rollbacks from `move` return to; those that `log` lacks are read. Raises
    IntegrityError if one of them is damaged or gone."""
    logged = {event.sha256: event for event in log}
    while (beneath := move.body.get("beneath")) is not None:
        try:
            move = logged.get(beneath["sha256"]) or event_log.read_event(store, name, beneath)
        except IntegrityError as exc:
            raise IntegrityError(f"{exc}: name the version to go back to with --to") from exc
        yield move


def before(store: Store, name: str, pointer: Pointer) -> str | None:
    """Return the version that a rollback of the alias returns to; None if there is none. Raises IntegrityError if the
    event that brought it is damaged or gone."""
    move = next(_moves_beneath(store, name, event_of(pointer), []), None)
    return str(move.body["to"]) if move else None


def rollback_versions(store: Store, name: str, pointer: Pointer) -> dict[str, str]:
    """Map the version that the alias holds, and those that rollbacks return to, to their manifests' sha256. Raises
    IntegrityError if the event of one of these moves is damaged or gone."""
    move = event_of(pointer)
    moves = [move, *_moves_beneath(store, name, move, [])]
    return {str(move.body["to"]): str(move.body["manifest_sha256"]) for move in reversed(moves)}


def move_alias(
    store: Store,
    name: str,
    alias: str,
    version: str,
    *,
    expected: Pointer | None,
    kind: MoveKind,
    cause: Cause,
    back_to: Event | None = None,
) -> Event:
    """Move the alias from `expected` (None: it does not exist yet) to a version, after verifying every byte of it.

    An alias that points there already is left alone, and its event is written if the log lacks it. `back_to` is the
    earlier move to that version that this one returns to, and whose evidence counts again; None makes a new move on
    top of the others.

    Raises:
        ObjectMissing: there is no such version, or it was removed meanwhile. The alias is then moved back; a new alias
            stays.
        IntegrityError: the version is damaged, not the adapter that its id says, not the one that was published or
            held the alias before, or signed by no trusted key.
        AliasConflict: the alias is no longer where `expected` says; carries who holds it now.
    """
    if expected is not None and expected.version == version:
        return _confirm_version(store, name, expected)
    vouched = back_to.body["manifest_sha256"] if back_to else None
    manifest = verify_whole(store, version_key(name, version), manifest_sha256=vouched)
    event_log.require_published(store, name, version, manifest)
    require_signed(store, name, version, manifest.sha256, alias=alias)
    # The log must be whole before the pointer that could complete it is replaced.
    last = _logged(store, name, expected).reference if expected else None
    before = expected.version if expected else None
    earlier = back_to.body.get("evidence", {}) if back_to else {}
    body = {
        "alias": alias, "from": before, "to": version, "manifest_sha256": manifest.sha256, "run_id": cause.run_id,
        "actor": cause.actor, "reason": cause.reason, "previous": last, "evidence": {**earlier, **cause.evidence},
        "beneath": back_to.body.get("beneath") if back_to else last,
    }  # fmt: skip
    since = _after(expected.since) if expected else now()
    fields = {"version": version, "manifest_sha256": manifest.sha256, "since": since, "run_id": cause.run_id}
    pointer = encode_json({"format": FORMAT, **fields, "kind": kind, "event": body})
    key = _alias_key(name, alias)
    try:
        with changing(store, name):
            if expected is None:
                etag = store.create(key, pointer, content_type=JSON)
            else:
                etag = store.swap(key, pointer, expected.etag, content_type=JSON)
    except Conflict as exc:
        holder = read_alias(store, name, alias)
        if holder is not None and holder.version == version:  # another process made the same move
            return _confirm_version(store, name, holder)
        raise _conflict(name, alias, version, before, holder) from exc
    logger.info("%s@%s: %s -> %s (%s)", name, alias, body["from"] or "nothing", version, kind)
    moved = Pointer(alias, **fields, kind=kind, event=body, etag=etag)
    try:
        return _confirm_version(store, name, moved)
    except ObjectMissing:
        if expected is not None:
            undo, came = replace(cause, reason=f"{version} was removed meanwhile", evidence={}), event_of(expected)
            with contextlib.suppress(AliasConflict):  # another command has moved it on
                before = expected.version
                move_alias(store, name, alias, before, expected=moved, kind="rolled_back", cause=undo, back_to=came)
        raise


def _confirm_version(store: Store, name: str, pointer: Pointer) -> Event:
    """Return the event of a move that has been made, after checking that its version still exists.

    `collect.remove` deletes the manifest and then reads the aliases; a move writes the alias and then reads the
    manifest. The store is strongly consistent, so at least one of the two sees the other. Raises ObjectMissing if the
    version was removed while the alias moved to it.
    """
    event = event_of(pointer)
    event = replace(event, uri=append_event(store, name, event.kind, event.body, at=event.time))
    manifest = find_manifest(store, version_key(name, pointer.version))
    if manifest is None or manifest.sha256 != pointer.manifest_sha256:
        raise ObjectMissing(
            f"{name} {pointer.version} was removed or exchanged while {pointer.alias} moved to it: promote a version "
            f"that is there; `fineloop adapters history {name}` says what happened"
        )
    return event


def _logged(store: Store, name: str, pointer: Pointer) -> Event:
    """Return the event that moved the alias to where `pointer` says, and write it if the log lacks it."""
    event = event_of(pointer)
    logged = find_event(store, name, event.reference)
    return logged or replace(event, uri=append_event(store, name, event.kind, event.body, at=event.time))


def event_of(pointer: Pointer) -> Event:
    """Return the event that moved the alias to where it points; its `uri` is not looked up, and empty."""
    # `since` tells a move from an equal one made earlier: the same version promoted, rolled back, promoted again.
    body = {**pointer.event, "since": pointer.since}
    return Event(
        event_log.event_sha256(pointer.kind, body)[: event_log.ID_LENGTH], pointer.kind, pointer.since, "", body
    )


def _conflict(
    name: str, alias: str, version: str, expected: str | None, holder: Pointer | None, *, since: str = ""
) -> AliasConflict:
    current = holder.version if holder else None
    by = f"{current} since {holder.since} (run {holder.run_id or 'unknown'})" if holder else "no version"
    how = f"compare {version} with that one in another run, which then promotes it"
    what = f"was expected to be held by {expected or 'no version'}{since and f' ({since})'}, but it is held by {by}"
    if holder and current == expected and not since:
        what, how = f"was moved meanwhile, and is held by {by} again", "run this again"
    conflict = AliasConflict(f"{name}@{alias} {what}: {'nothing is moved' if holder and current == version else how}")
    conflict.holder = {key: getattr(holder, key) for key in ("alias", "version", "since", "run_id")} if holder else {}
    return conflict


def _after(time: str) -> str:
    """Return the current time, or just after `time` if this clock is behind: an alias's moves sort as they happened."""
    earliest = datetime.max.replace(tzinfo=UTC)
    with contextlib.suppress(OverflowError):  # a clock at the end of all time: nothing sorts after it
        earliest = (datetime.fromisoformat(time) + timedelta(microseconds=1)).astimezone(UTC)
    return max(now(), earliest.isoformat(timespec="microseconds").replace("+00:00", "Z"))


def _alias_key(name: str, alias: str) -> str:
    return adapter_key(name, "aliases", f"{checked_name(alias, 'alias')}.json")


# Signs with a new key, before an old one may go, all versions that aliases hold or that a rollback may return to.


class Signed(NamedTuple):
    """A statement signed by the key: that the version may hold the alias or, where that is empty, is revoked."""

    version: str
    alias: str
    signature_uri: str


def sign_held(store: Store, name: str, key: signing.Signer) -> list[Signed]:
    """Sign every version of the adapter that is needed, and repeat trusted keys' revocations of stored versions. Raises
    ObjectMissing if a version is gone; IntegrityError if one or the log is damaged: those before it are signed."""
    signed = []
    for version in sorted(store.folders(adapter_key(name, "signatures/"))):
        manifest = folders.find_manifest(store, version_key(name, version))
        statements = manifest and signing.statements(store, name, version, manifest.sha256, store.trusted_keys)
        if statements and statements.revoked_by:
            signed.append(Signed(version, "", signing.revoke(store, name, version, key, reason=statements.reason)))
    revoked = {statement.version for statement in signed}
    for pointer in list_aliases(store, name):
        for version, sha256 in rollback_versions(store, name, pointer).items():
            gone_since = signing.statements(store, name, version, sha256, store.trusted_keys).revoked_by
            if version not in revoked and not gone_since:
                uri = signing.sign(store, name, version, key, alias=pointer.alias, manifest_sha256=sha256)
                signed.append(Signed(version, pointer.alias, uri))
    return signed
