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
    """What one event knows of another: where it lies, and every byte of it."""

    time: str
    sha256: str


class _Named(Part):
    """A `Reference` as it is read."""

    time: str
    sha256: str


class Evidence(Part):
    """The evidence for a move."""

    decision: str = ""
    """URI of a gate's decision; empty where a person moved the alias."""
    sha256: str = ""
    """Of the decision."""
    anchor: str | None = None
    """The best version so far, from this move on."""
    anchor_before: str | None = None
    """The one that a person replaced by it."""
    test_set: list[str] = []


class Body(Part):
    """What readers of the log rely on in a body, of whatever kind the event is: no key is of another type."""

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
    """A move holds alias, from, to, manifest_sha256, run_id, actor, reason, evidence and since; `previous`, the
    reference of the move before it, and `beneath`, that of the move to which a rollback of this one returns."""

    @property
    def sha256(self) -> str:
        """Of kind and body; the id is its beginning."""
        return event_sha256(self.kind, self.body)

    @property
    def reference(self) -> Reference:
        """How another event names this one."""
        return {"time": self.time, "sha256": self.sha256}

    def move(self) -> dict[str, str | None]:
        """What the command line prints of a promotion or a rollback."""
        return {"alias": self.body["alias"], "from": self.body["from"], "to": self.body["to"], "event_uri": self.uri}


def event_sha256(kind: str, body: Mapping[str, Any]) -> str:
    """What an event is known by, in hex."""
    return hashlib.sha256(encode_json([kind, dict(body)])).hexdigest()
