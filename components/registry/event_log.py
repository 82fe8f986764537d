"""The event log of an adapter: append-only, one object per event, identified by its content."""

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from components.records.steps import Part
from components.registry.cache import READS_AT_ONCE, WORTH_AN_INDEX, Index
from components.registry.identity import adapter_key
from components.shared.errors import Conflict, IntegrityError
from components.store.folders import Manifest, now
from components.store.store import JSON, Store, decode_json, encode_json

logger = logging.getLogger(__name__)

ID_LENGTH = 12
MOVE_KINDS = ("promoted", "overridden", "rolled_back")
EventKind = Literal["published", "promoted", "refused", "proposed", "overridden", "rolled_back", "collected", "checked"]


class Reference(TypedDict):
    """How one event names another: `time` and `sha256` locate it, and `sha256` fixes its content."""

    time: str
    sha256: str


class Evidence(Part):
    """The evidence for a move."""

    decision: str = ""
    """URI of a gate's decision; empty where a person moved the alias."""
    sha256: str = ""
    """SHA-256 of the decision."""
    anchor: str | None = None
    """The best version so far, from this move on."""
    anchor_before: str | None = None
    """The anchor that a person replaced by `anchor`."""
    test_set: list[str] = []


class Body(Part):
    """The keys of an event's body, of any kind, that readers of the log rely on, with their types."""

    version: str | None = None
    champion: str | None = None
    alias: str = ""
    run_id: str = ""
    manifest_sha256: str = ""
    decision_sha256: str = ""
    test_set: list[str] = []
    reasons: list[str] = []
    moved_from: str | None = Field(None, alias="from")
    to: str = ""
    since: str = ""
    actor: str = ""
    reason: str = ""
    evidence: Evidence = Evidence()
    evaluation_sha256: str = ""
    """Of a look at production: SHA-256 of its run's evaluation."""
    previous: Reference | None = None
    beneath: Reference | None = None


@dataclass(frozen=True)
class Event:
    """One entry of an adapter's log."""

    id: str
    """Derived from kind and body, so that writing an event twice leaves one."""
    kind: EventKind
    time: str
    uri: str
    body: dict[str, Any]
    """For a move: alias, from, to, manifest_sha256, run_id, actor, reason, evidence and since; `previous`, the
    reference of the move before it; and `beneath`, that of the move to which a rollback of this one returns."""

    @property
    def sha256(self) -> str:
        """`id` is its beginning."""
        return event_sha256(self.kind, self.body)

    @property
    def reference(self) -> Reference:
        return {"time": self.time, "sha256": self.sha256}

    def move(self) -> dict[str, str | None]:
        """Return what the command line prints about a promotion or a rollback."""
        return {"alias": self.body["alias"], "from": self.body["from"], "to": self.body["to"], "event_uri": self.uri}


def event_sha256(kind: str, body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an event's kind and body, in hex."""
    return hashlib.sha256(encode_json([kind, dict(body)])).hexdigest()


_EVENT = TypeAdapter(Event)


def append_event(store: Store, name: str, kind: EventKind, body: Mapping[str, Any], *, at: str | None = None) -> str:
    """Add an event to the log and return its URI. If an event of equal kind and body exists, nothing is written.

    `at` is the time to file it under, by default now; giving it makes a repetition cheap. Its name follows from its
    content: where somebody has put something else there, the event gets a further name, which nobody can foresee.
    """
    sha256 = event_sha256(kind, body)
    event_id = sha256[:ID_LENGTH]
    if at is None:
        for info in store.list(events_key(name)):
            if f"-{event_id}" in info.key and (logged := event_at(store, name, info.key)) and logged.sha256 == sha256:
                return logged.uri
        at = now()
    reference: Reference = {"time": at, "sha256": sha256}
    key = _key(name, reference)
    event = {"format": 1, "id": event_id, "kind": kind, "time": at, "adapter": name, "body": dict(body)}
    record = encode_json(event)
    try:
        store.create(key, record, content_type=JSON)
    except Conflict:
        if logged := find_event(store, name, reference):
            return logged.uri
        key = f"{key.removesuffix('.json')}-{secrets.token_hex(8)}.json"
        store.create(key, record, content_type=JSON)
    return store.uri(key)


def publication(version: str, manifest: Manifest) -> dict[str, Any]:
    """Return the body of the event of a version's publication with this manifest, filed at `manifest.created_at`."""
    run_id = str(manifest.about.get("run_id", ""))
    return {"version": version, "manifest_sha256": manifest.sha256, "run_id": run_id}


def require_published(store: Store, name: str, version: str, manifest: Manifest) -> None:
    """Require that the log has the event of the version's publication with exactly this manifest. Raises IntegrityError
    if the log has no such event."""
    sha256 = event_sha256("published", publication(version, manifest))
    if find_event(store, name, {"time": manifest.created_at, "sha256": sha256}) is None:
        raise IntegrityError(
            f"no event says that {name} {version} was published with the manifest that it has: it was changed since, "
            "or its publication did not end, which running its run again would do"
        )


def events(store: Store, name: str, *, index: Index | None = None) -> list[Event]:
    """Return the adapter's log, oldest first. Objects that are not events are left out with a warning.

    `index` is the caller's, who keeps it.
    """
    own = index or Index(store, name, worth=WORTH_AN_INDEX)
    log = _sound(store, name, own.documents("events", store.list(events_key(name))).items())
    if index is None:
        own.keep()
    return log


def read_event(store: Store, name: str, reference: Reference) -> Event:
    """Read the event that another one names, and verify its content. Raises IntegrityError if the event is gone, or has
    changed."""
    event = find_event(store, name, reference)
    if event is None:
        key = _key(name, reference)
        raise IntegrityError(f"{store.uri(key)} is not the event that a later one names, or is gone from the log")
    return event


def read_log(store: Store, name: str) -> tuple[list[Event], dict[str, str]]:
    """Read every object of the log: the events, oldest first, and key and reason for each object that is no event."""
    keys = [info.key for info in store.list(events_key(name))]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return parse_log(store, name, zip(keys, pool.map(store.get, keys), strict=True))


def events_key(name: str) -> str:
    """Key prefix of an adapter's events, with a trailing slash."""
    return adapter_key(name, "events/")


def parse_log(store: Store, name: str, objects: Iterable[tuple[str, bytes]]) -> tuple[list[Event], dict[str, str]]:
    """Parse a log as `read_log` does, from (key, content) of each object in its folder."""
    parsed, junk = [], {}
    for key, body in objects:
        try:
            parsed.append(_event(store, name, key, decode_json(body, store.uri(key))))
        except (IntegrityError, ValueError, TypeError, KeyError) as exc:
            junk[key] = " ".join(str(exc).split())
    # Two writers at once, or one that met junk, may have filed one of them twice.
    first = {event.sha256: event for event in sorted(parsed, key=lambda event: (event.time, event.uri), reverse=True)}
    return sorted(first.values(), key=lambda event: (event.time, event.id)), junk


def _sound(store: Store, name: str, objects: Iterable[tuple[str, bytes]]) -> list[Event]:
    log, junk = parse_log(store, name, objects)
    for key, why in junk.items():
        logger.warning("%s is not an event, and passed over: %s", store.uri(key), why)
    return log


def find_event(store: Store, name: str, reference: Reference) -> Event | None:
    """The event, under its own name or a further one; None if the log has neither."""
    key = _key(name, reference)
    further = (info.key for info in store.list(f"{key.removesuffix('.json')}-"))
    logged = (event_at(store, name, place) for place in chain([key], further))
    return next((event for event in logged if event and event.sha256 == reference["sha256"]), None)


def event_at(store: Store, name: str, key: str) -> Event | None:
    """The event of this object; None if it is none, with a warning, or is not there."""
    stored = store.read(key)
    return next(iter(_sound(store, name, [(key, stored[0])] if stored else [])), None)


def _event(store: Store, name: str, key: str, record: Any) -> Event:
    event = _EVENT.validate_python({**record, "uri": store.uri(key)})
    if event.id != event.sha256[:ID_LENGTH]:
        raise ValueError("its id is not that of its content")
    own = _key(name, event.reference)
    if key != own and not key.startswith(f"{own.removesuffix('.json')}-"):
        raise ValueError("it is filed under another name than its content has")
    Body.model_validate(event.body)
    if event.kind in MOVE_KINDS:
        event.body["alias"], event.body["from"], event.body["to"], event.body["manifest_sha256"]
    return event


def _key(name: str, reference: Reference) -> str:
    file = f"{reference['time'].replace(':', '')}-{reference['sha256'][:ID_LENGTH]}.json"
    return adapter_key(name, "events", file)


def is_held(log: Sequence[Event], version: str, alias: str) -> bool:
    """Whether a gate refused the version for this alias, or left it to a person who has not approved it yet."""
    about = [event for event in log if event.body.get("version") == version and event.body.get("alias") == alias]
    if any(event.kind == "refused" for event in about):
        return True
    approved = any(event.kind == "promoted" and event.body["to"] == version for event in moves(log, alias))
    return not approved and any(event.kind == "proposed" for event in about)


def promotion(log: Sequence[Event], run_id: str, alias: str) -> Event | None:
    """The move that carried out the run's decision; None if none did."""
    carried_out = [event for event in moves(log, alias) if event.body.get("run_id") == run_id]
    return next((event for event in carried_out if event.body.get("evidence", {}).get("sha256")), None)


def decisions(log: Sequence[Event]) -> dict[str, tuple[str, Event]]:
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


def is_override(log: Sequence[Event], version: str, alias: str) -> bool:
    """Whether going back to the version overrides a gate: the gate holds it back, and it never held the alias."""
    return is_held(log, version, alias) and all(event.body["to"] != version for event in moves(log, alias))


def waiting(log: Sequence[Event], holders: Mapping[str, str]) -> set[str]:
    """The versions that a gate left to a person, who may still approve them, because the version that they were
    compared with still holds the alias. `holders` are versions by alias."""
    proposed = [event.body for event in log if event.kind == "proposed"]
    return {
        str(body.get("version")) for body in proposed if body.get("champion") == holders.get(str(body.get("alias")))
    }


def moves(log: Sequence[Event], alias: str) -> list[Event]:
    """The events that moved the alias, in the order of the log, oldest first."""
    return [event for event in log if event.kind in MOVE_KINDS and event.body["alias"] == alias]


def is_chain(moves: Sequence[Event]) -> bool:
    """Whether each move begins where the one before it ended and names it, and the first began without an alias."""
    if not moves or (moves[0].body["from"], moves[0].body.get("previous")) != (None, None):
        return False
    return all(
        (later.body["from"], later.body.get("previous")) == (earlier.body["to"], earlier.reference)
        for earlier, later in pairwise(moves)
    )


def decided_before(
    log: Sequence[Event],
    alias: str,
    test_set: Sequence[str],
    *,
    run_id: str,
    counts: Callable[[Event], bool] = lambda event: True,
    replaced: bool = False,
) -> list[Event]:
    """Return the event about the outcome of each run other than `run_id` on this test set, oldest first.

    `test_set` is the sample of the test set that an evaluation names, which has at least half in common with itself
    after a refresh; without it, earlier decisions are unknown. `counts` tells whether there is a decision behind an
    event: a training may write events too. `replaced` leaves the decisions that replaced one version by another, by the
    gate's own rules.
    """
    ours, by_run = set(test_set), dict[str, Event]()
    for event in log:
        body, other = event.body, str(event.body.get("run_id", ""))
        sample = body.get("test_set") or body.get("evidence", {}).get("test_set") or ()  # of a refusal or a promotion
        is_about = body.get("alias") == alias and ours and len(ours.intersection(sample)) >= len(ours) / 2
        if not is_about or (replaced and not (event.kind == "promoted" and body.get("from"))):
            continue
        # The first event of each run that counts; one that does not must not hide one that does.
        if other != run_id and other not in by_run and counts(event):
            by_run[other] = event
    return list(by_run.values())


def confidence_at(look: int, confidence: float, passed: int = 0) -> float:
    """Return the confidence required of the k-th look, after `passed` passes: LOND, with 1 / (k (k + 1)) as sequence.

    The false discovery rate, the expected share of wrong passes among all passes on a test set, is at most the error
    rate of one look, however many looks there will be (Javanmard and Montanari, arXiv:1502.06197; for looks that depend
    on each other positively, as those at the same records do, Zrnic, Ramdas and Jordan, arXiv:1812.05068). While at
    most one look has passed, all looks together have that error rate.
    """
    return 1 - (1 - confidence) * max(passed, 1) / (look * (look + 1))
