"""Cron as the server reads it (robfig/cron v1): seconds first, a missing last field means any day of the week.

Names of months and days, and words such as @daily, which the server knows too, are none here: nobody sends them.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from tests.doubles.kfp_server.errors import ApiError, invalid

BOUNDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


class Cron:
    """A cron expression of the server."""

    def __init__(self, text: str) -> None:
        fields = text.split()
        if len(fields) not in (5, 6):
            raise _refusal(f"Expected 5 to 6 fields, found {len(fields)}: {text}")
        fields += ["*"] * (6 - len(fields))
        read = [_field(field, *bounds) for field, bounds in zip(fields, BOUNDS, strict=True)]
        self.seconds, self.minutes, self.hours, self.days, self.months, self.weekdays = (values for values, _ in read)
        self._either = not (read[3][1] or read[5][1])

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Every time after a moment."""
        times = sorted((h, m, s) for h in self.hours for m in self.minutes for s in self.seconds)
        day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        for _ in range(5 * 366):
            if self._falls_on(day):
                for hour, minute, second in times:
                    found = day.replace(hour=hour, minute=minute, second=second)
                    if found > moment:
                        yield found
            day += timedelta(days=1)

    def _falls_on(self, day: datetime) -> bool:
        in_month, in_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (in_month or in_week if self._either else in_month and in_week)


def _field(text: str, low: int, high: int) -> tuple[set[int], bool]:
    values: set[int] = set()
    starred = False
    for part in text.split(","):
        span, _, step = part.partition("/")
        first, dash, last = span.partition("-")
        if first in ("*", "?"):
            starred, start, end = True, low, high
        else:
            start = _number(first)
            end = _number(last) if dash else high if step else start
        if start < low:
            raise _refusal(f"Beginning of range ({start}) below minimum ({low}): {part}")
        if end > high:
            raise _refusal(f"End of range ({end}) above maximum ({high}): {part}")
        if start > end:
            raise _refusal(f"Beginning of range ({start}) beyond end of range ({end}): {part}")
        values.update(range(start, end + 1, _number(step) if step else 1))
    return values, starred


def _number(text: str) -> int:
    if not text.isdigit():
        raise _refusal(f"Failed to parse int from {text}")
    return int(text)


def _refusal(why: str) -> ApiError:
    return invalid(f"Schedule cron is not a supported format(https://godoc.org/github.com/robfig/cron). Error: {why}")
