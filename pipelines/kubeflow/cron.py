"""Cron of five fields, as crontab has it: checked, explained in words, and written as Kubeflow Pipelines wants it.

Kubeflow reads cron with robfig/cron v1: SECONDS come first, and five fields are accepted and mean something else
(`0 2 * * *` is the second minute of every hour). Sunday is 0 only, and there is no L, W or #.
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
    """The five fields of a cron expression, nicknames spelled out.

    Raises:
        UserError: it is not one, never comes, or says what Kubeflow's scheduler cannot.
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
    """Five parsed fields as Kubeflow's six, in numbers; the first is seconds."""
    cron = CronSim(expression, datetime.now(UTC))
    weekdays = {day % 7 for day in cron.weekdays if isinstance(day, int)}
    sets: list[set[int]] = [cron.minutes, cron.hours, cron.days, cron.months, weekdays]
    # A field that starts with a star keeps it: whether day of month and day of week must both fit hangs on that.
    fields = [
        field if field.startswith("*") else _spans(values)
        for field, values in zip(expression.split(), sets, strict=True)
    ]
    return " ".join(["0", *fields])


def from_kfp(cron: str) -> str:
    """Kubeflow's six fields as crontab's five; empty where that cannot be said, and people are shown the six."""
    fields = cron.split()
    if len(fields) != len(RANGES) + 1 or fields[0] != "0":
        return ""
    try:
        return parse(" ".join(fields[1:]))
    except UserError:
        return ""


def words(expression: str) -> str:
    """Five parsed fields in English."""
    text = CronSim(expression, datetime.now(UTC)).explain()
    return text[:1].lower() + text[1:]


def next_times(
    expression: str, *, now: datetime, start: datetime | None = None, end: datetime | None = None
) -> list[datetime]:
    """The next five times, fewer where the end comes first."""
    times = CronSim(expression, max(now, start or now).astimezone(UTC))
    return list(itertools.takewhile(lambda time: end is None or time <= end, itertools.islice(times, NUM_NEXT)))


def _mistake(fields: Sequence[str], field: str) -> str:
    """What is wrong with a field, or with the 31st of months that have none."""
    any_month = " ".join([*fields[:3], "*", fields[4]])
    if field == "day-of-month":
        with contextlib.suppress(CronSimError):
            CronSim(any_month, datetime.now(UTC))
            return NEVER
    return f"{field} takes {RANGES[field]}, *, lists, ranges and /steps"


def _spans(values: Iterable[int]) -> str:
    """Numbers as a list of numbers and ranges."""
    ordered = sorted(values)
    groups = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
