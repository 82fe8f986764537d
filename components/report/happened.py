"""Events of an adapter in words."""

from collections.abc import Mapping
from typing import Any

from components.registry.aliases import PIPELINE
from components.report.numbers import moment, parse_moment

HAPPENED = {
    "published": "published",
    "promoted": "promoted",
    "overridden": "promoted although the gate refused it",
    "rolled_back": "gone back to",
    "refused": "refused by the gate",
    "proposed": "left to a person by the gate",
    "collected": "removed, since nothing needed it",
}


def what(kind: str, body: Mapping[str, Any]) -> str:
    """What happened to which version, and under which alias: of an event."""
    version, alias = body.get("to") or body.get("version") or "", body.get("alias")
    return f"{version} {HAPPENED[kind]}{f' at {alias}' if alias else ''}".strip()


def who(kind: str, body: Mapping[str, Any]) -> str:
    """By name: a person, or the machine."""
    if kind in ("published", "refused", "proposed") or body.get("actor") == PIPELINE:
        return "the pipeline"
    return body.get("actor") or "an unnamed person"


def why(body: Mapping[str, Any]) -> str:
    """The reason that was given, or the gate's sentences."""
    return str(body.get("reason") or " ".join(body.get("reasons") or []))


def when(time: str) -> str:
    """A point in time; as it is where it cannot be read."""
    parsed = parse_moment(time)
    return moment(parsed) if parsed else time
