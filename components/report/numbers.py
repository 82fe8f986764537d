"""Formats numbers, sizes and times for the report; metrics format their own values."""

import re
from datetime import UTC, datetime

from components.shared.metrics import usual_decimals


def number(value: float) -> str:
    """Three decimals for small numbers, fewer for large ones, thousands separated."""
    return f"{value:,.{usual_decimals(value)}f}"


def count(value: int | float | None) -> str:
    """A whole number with thousands separated."""
    return "unknown" if value is None else f"{value:,.0f}"


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
    """An ISO 8601 text or seconds since 1970 as a time in UTC, or None if it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC)
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
