"""Checks cron expressions of five fields, as in crontab, explains them in words, and converts them for Kubeflow.

Kubeflow Pipelines parses cron with robfig/cron v1: SECONDS come first, and five fields are accepted but mean something
else (`0 2 * * *` is the second minute of every hour). Sunday is only 0, and L, W and # are not supported.
"""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from cronsim import CronSim, CronSimError

from components.shared.errors import UserError

NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
RANGES = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT",
}
NUM_NEXT = 5
NEVER = "there is no such day in these months"


def parse(text: str) -> str:
    """Check a cron expression and return its five fields, with nicknames such as @daily replaced.

    Raises:
        UserError: it is not valid, never matches a time, or uses what Kubeflow's scheduler does not support.
    """
    expression = " ".join(NICKNAMES.get(text.strip().lower(), text).upper().split())
    if expression.startswith("@"):
        raise UserError(f"--cron {text!r}: expected five fields, or one of {', '.join(NICKNAMES)}")
    fields = expression.split()
    if len(fields) != len(RANGES):
        seconds = f"; without seconds it is {' '.join(fields[1:])!r}" if len(fields) == len(RANGES) + 1 else ""
        raise UserError(
            f"--cron {text!r}: expected five fields (minute, hour, day of month, month, day of week), "
            f"got {len(fields)}{seconds}"
        )
    try:
        cron = CronSim(expression, datetime.now(UTC))
    except CronSimError as exc:
        raise UserError(f"--cron {text!r}: {_mistake(fields, str(exc).removeprefix('Bad '))}") from exc
    if any(not isinstance(item, int) or item < 0 for item in cron.days | cron.weekdays):
        raise UserError(f"--cron {text!r}: Kubeflow's scheduler knows neither L nor #")
    return expression


def to_kfp(expression: str) -> str:
    """Convert five parsed fields to Kubeflow's six, in numbers; the first is seconds."""
    cron = CronSim(expression, datetime.now(UTC))
    weekdays = {day % 7 for day in cron.weekdays if isinstance(day, int)}
    sets: list[set[int]] = [cron.minutes, cron.hours, cron.days, cron.months, weekdays]
    # Keep a leading star: it decides whether day of month and day of week must both match.
    fields = [
        field if field.startswith("*") else _spans(values)
        for field, values in zip(expression.split(), sets, strict=True)
    ]
    return " ".join(["0", *fields])


def from_kfp(cron: str) -> str:
    """Convert Kubeflow's six fields to crontab's five; empty if there is no equivalent, so that the six are shown."""
    fields = cron.split()
    if len(fields) != len(RANGES) + 1 or fields[0] != "0":
        return ""
    try:
        return parse(" ".join(fields[1:]))
    except UserError:
        return ""


def words(expression: str) -> str:
    """Return five parsed fields in English."""
    text = CronSim(expression, datetime.now(UTC)).explain()
    return text[:1].lower() + text[1:]


def next_times(
    expression: str, *, now: datetime, start: datetime | None = None, end: datetime | None = None
) -> list[datetime]:
    """Return the next five times, or fewer if `end` comes first."""
    times = CronSim(expression, max(now, start or now).astimezone(UTC))
    return list(itertools.takewhile(lambda time: end is None or time <= end, itertools.islice(times, NUM_NEXT)))


def _mistake(fields: Sequence[str], field: str) -> str:
    """Say what is wrong with a field, or that the months have no such day, such as a 31st."""
    any_month = " ".join([*fields[:3], "*", fields[4]])
    if field == "day-of-month":
        with contextlib.suppress(CronSimError):
            CronSim(any_month, datetime.now(UTC))
            return NEVER
    return f"{field} takes {RANGES[field]}, *, lists, ranges and /steps"


def _spans(values: Iterable[int]) -> str:
    """Format numbers as a cron list of numbers and ranges."""
    ordered = sorted(values)
    groups = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
