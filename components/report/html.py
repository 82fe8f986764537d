"""What pages are written with: numbers, sizes and times as text, and the templates with their escaping."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.registry.aliases import PIPELINE
from components.shared.metrics import usual_decimals
from components.shared.protocol import script_source


def number(value: float) -> str:
    """Three decimals for small numbers, fewer for large ones, thousands separated."""
    return f"{value:,.{usual_decimals(value)}f}"


def count(value: int | float | None) -> str:
    """A whole number with thousands separated."""
    return "unknown" if value is None else f"{value:,.0f}"


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


MAX_TEXT_CHARS = 900


def clipped(text: str) -> str:
    """Return the text, or its beginning and how much is missing."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} … ({count(len(text) - MAX_TEXT_CHARS)} more characters)"


def moment(value: datetime) -> str:
    """A point in time, in UTC, to the minute."""
    return value.astimezone(UTC).strftime("%-d %B %Y, %H:%M UTC")


def sure_once(text: str) -> str:
    """Name the confidence of bounds where it is first said and where it changes, and not after each of them."""
    before = ""

    def said(match: re.Match[str]) -> str:
        nonlocal before
        is_new, before = match[1] != before, match[1]
        return match[0] if is_new else ""

    return re.sub(r", (?:each )?with ([\d.]+) % confidence", said, text)


def parse_moment(value: object) -> datetime | None:
    """An ISO 8601 text as a time, in UTC where it names no zone; None if it is none."""
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


# The templates of every page and picture. Values put into them are escaped, and a missing value is an error.

TEMPLATES = Path(__file__).parent / "templates"
SEARCH = (TEMPLATES / "search.js").read_text(encoding="utf-8")
"""The only script of a page: it narrows a table to the rows that contain the searched words."""


def template(name: str) -> Template:
    """Load a template from the folder beside this module."""
    return _environment().get_template(name)


@cache  # it keeps what it has compiled
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Keeps a number and its per cent sign on one line.
    environment.filters["tight"] = lambda text: text.replace(" %", "\u00a0%")
    environment.filters |= {"count": count, "clipped": clipped}
    environment.globals["zip"] = zip
    # A page with a search sets this: {% set searches = true %}.
    environment.globals |= {"searches": False, "search_script": SEARCH, "search_source": script_source(SEARCH)}
    return environment


# Events of an adapter in words.

HAPPENED = {
    "published": "{version} published",
    "promoted": "{version} promoted to {alias}",
    "overridden": "{version} promoted to {alias} although the gate refused it",
    "rolled_back": "{alias} went back to {version}",
    "refused": "{version} refused by the gate",
    "proposed": "{version} left to a person by the gate",
    "collected": "{version} removed, since nothing needed it",
    "checked": "{version}, which {alias} held, looked at on records that came since",
}


def what(kind: str, body: Mapping[str, Any]) -> str:
    """What happened to which version, and under which alias: of an event."""
    version, alias = body.get("to") or body.get("version") or "", body.get("alias") or "an alias"
    return HAPPENED[kind].format(version=version, alias=alias).strip()


def who(kind: str, body: Mapping[str, Any]) -> str:
    """By name: a person, or the machine."""
    if kind in ("published", "refused", "proposed", "checked") or body.get("actor") == PIPELINE:
        return "the pipeline"
    return body.get("actor") or "an unnamed person"


def why(body: Mapping[str, Any]) -> str:
    """The reason that was given, or the gate's sentences."""
    return sure_once(str(body.get("reason") or " ".join(body.get("reasons") or [])))


def when(time: str) -> str:
    """A point in time; as it is where it cannot be read."""
    parsed = parse_moment(time)
    return moment(parsed) if parsed else time
