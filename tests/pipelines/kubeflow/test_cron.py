import itertools
import re
from datetime import UTC, datetime

import pytest

from components.shared.errors import UserError
from pipelines.kubeflow import schedule
from tests.doubles.kfp_server.cron import Cron

NOW = datetime(2026, 11, 25, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "expression", "kfp", "words"),
    [
        ("0 2 * * *", "0 2 * * *", "0 0 2 * * *", "at 02:00 every day"),
        ("30 6 * * mon-fri", "30 6 * * MON-FRI", "0 30 6 * * 1,2,3,4,5", "at 06:30 on Monday through Friday"),
        ("15 3 1 JAN,jul *", "15 3 1 JAN,JUL *", "0 15 3 1 1,7 *", "at 03:15 on the first day of January and July"),
        ("*/20 9-11 * * *", "*/20 9-11 * * *", "0 */20 9,10,11 * * *", "every 20th minute from 09:00 through 11:59"),
        ("0 0 * * 7", "0 0 * * 7", "0 0 0 * * 0", "at 00:00 on Sunday"),
        ("@daily", "0 0 * * *", "0 0 0 * * *", "at 00:00 every day"),
    ],
)
def test_cron_is_read_told_and_put_as_kubeflow_wants_it(given: str, expression: str, kfp: str, words: str) -> None:
    parsed = schedule.parse(given)
    assert (parsed, schedule.to_kfp(parsed), schedule.words(parsed)) == (expression, kfp, words)


@pytest.mark.parametrize(
    "given",
    ["*/7 */5 * * *", "0 0 1 * 7", "0 0 1-7 * MON", "0 3 */2 * 1", "59 23 31 12 *", "1 2 * 2-4/2 0,6", "0 2 * * 5-7"],
)
def test_kubeflow_would_start_runs_at_the_times_that_are_told(given: str) -> None:
    expression = schedule.parse(given)
    times = schedule.Timing(expression).next_times(NOW)
    assert len(times) == 5
    assert times == list(itertools.islice(Cron(schedule.to_kfp(expression)).after(NOW), 5))
    back = schedule.from_kfp(schedule.to_kfp(expression))
    assert schedule.Timing(back).next_times(NOW) == times


def test_the_next_times_lie_between_start_and_end() -> None:
    start, end = datetime(2026, 12, 1, 2, tzinfo=UTC), datetime(2026, 12, 3, 2, tzinfo=UTC)
    timing = schedule.Timing("0 2 * * *", start=start, end=end)
    assert timing.next_times(NOW) == [datetime(2026, 12, day, 2, tzinfo=UTC) for day in (2, 3)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("61 * * * *", "bad minute"),
        ("0 0 * * 8", "bad day-of-week"),
        ("0 0 2 * * *", "got 6"),
        ("@often", "@hourly, @daily"),
        ("0 0 30,31 2 *", "as the months have them"),
        ("0 0 L * *", "neither L nor #"),
    ],
)
def test_what_is_no_cron_or_not_kubeflows_is_refused_with_the_fix(given: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        schedule.parse(given)


@pytest.mark.parametrize("kfp", ["30 0 2 * * *", "0 2 * * *", "@every 1h", "", "0 0 2 L * *"])
def test_what_five_fields_cannot_say_is_not_said(kfp: str) -> None:
    assert schedule.from_kfp(kfp) == ""
