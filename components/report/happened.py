"""Events of an adapter in words."""

from collections.abc import Mapping
from typing import Any

from components.registry.aliases import PIPELINE
from components.report.html import moment, parse_moment, sure_once

HAPPENED = {
    "published": "{version} published",
    "promoted": "{version} promoted to {alias}",
    "overridden": "{version} promoted to {alias} although the gate refused it",
    "rolled_back": "{alias} went back to {version}",
    "refused": "{version} refused by the gate",
    "proposed": "{version} left to a person by the gate",
    "collected": "{version} removed, since nothing needed it",
}


def what(kind: str, body: Mapping[str, Any]) -> str:
    """What happened to which version, and under which alias: of an event."""
    version, alias = body.get("to") or body.get("version") or "", body.get("alias") or "an alias"
    return HAPPENED[kind].format(version=version, alias=alias).strip()


def who(kind: str, body: Mapping[str, Any]) -> str:
    """By name: a person, or the machine."""
    if kind in ("published", "refused", "proposed") or body.get("actor") == PIPELINE:
        return "the pipeline"
    return body.get("actor") or "an unnamed person"


def why(body: Mapping[str, Any]) -> str:
    """The reason that was given, or the gate's sentences, which earlier releases joined by semicolons."""
    return sure_once(str(body.get("reason") or " ".join(body.get("reasons") or [])).replace(".; ", ". "))


def when(time: str) -> str:
    """A point in time; as it is where it cannot be read."""
    parsed = parse_moment(time)
    return moment(parsed) if parsed else time
