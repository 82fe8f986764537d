"""One entry of an adapter's event log."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pydantic import Field

from components.records.part import Part
from components.store.store import encode_json

EventKind = Literal["published", "promoted", "refused", "proposed", "overridden", "rolled_back", "collected"]


class Reference(TypedDict):
    """How one event names another: `time` and `sha256` locate it, and `sha256` fixes its content."""

    time: str
    sha256: str


class _Named(Part):
    """A `Reference`, as read from an event."""

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
    previous: _Named | None = None
    beneath: _Named | None = None


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
        """SHA-256 of kind and body, in hex; `id` is its beginning."""
        return event_sha256(self.kind, self.body)

    @property
    def reference(self) -> Reference:
        """The reference by which another event names this one."""
        return {"time": self.time, "sha256": self.sha256}

    def move(self) -> dict[str, str | None]:
        """Return what the command line prints about a promotion or a rollback."""
        return {"alias": self.body["alias"], "from": self.body["from"], "to": self.body["to"], "event_uri": self.uri}


def event_sha256(kind: str, body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an event's kind and body, in hex."""
    return hashlib.sha256(encode_json([kind, dict(body)])).hexdigest()
