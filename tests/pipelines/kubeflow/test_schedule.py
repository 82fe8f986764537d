"""`fineloop schedule` against the server double: how a cron is read, what is created, when it fires, what changes."""

import itertools
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import Mock

import pytest

from components.config import config_file
from components.shared.errors import UserError
from components.step.step import IMAGE
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import compile, schedule
from pipelines.kubeflow.client import connect
from tests.doubles.kfp_server.cron import Cron
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Answered, Fineloop

pytestmark = pytest.mark.usefixtures("small")

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


DAY = timedelta(days=1)
SLOW = ("--param", "seconds=60")


@pytest.fixture
def nightly(server: KfpServer, fineloop: Fineloop) -> Answered:
    """A schedule whose runs take a minute."""
    return fineloop("schedule", "create", "nightly", "--cron", "0 2 * * *", *SLOW)


def at_two(nth: int = 1) -> datetime:
    """The nth 02:00 UTC from now."""
    now = datetime.now(UTC)
    today = now.replace(hour=2, minute=0, second=0, microsecond=0)
    return today + (nth - (now < today)) * DAY


def record(server: KfpServer, answered: Answered) -> dict[str, Any]:
    return server.state.schedules[answered.body["recurring_run_id"]].record


def test_a_schedule_is_what_was_asked_for_and_is_told_in_words(server: KfpServer, nightly: Answered) -> None:
    body = nightly.body
    assert nightly.exit_code == 0
    assert (body["words"], body["cron"], body["time_zone"]) == ("at 02:00 every day", "0 2 * * *", "UTC")
    times = [datetime.fromisoformat(time) for time in body["next"]]
    assert len(times) == 5
    assert [time - times[0] for time in times] == [n * DAY for n in range(5)]
    assert datetime.now(UTC) < times[0] <= at_two()
    assert "at 02:00 every day, UTC" in nightly.stderr

    kept = record(server, nightly)
    assert kept["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"
    assert (kept["max_concurrency"], kept["no_catchup"]) == ("1", True)
    assert (kept["service_account"], kept["status"]) == ("fineloop-pipeline", "ENABLED")
    config = config_file.load(DEFAULT_CONFIG)
    assert kept["runtime_config"]["parameters"] == {"config": config_file.as_table(config), "seconds": 60}
    assert body["config_digest"] == config.digest


def test_at_its_time_it_starts_one_run_beside_which_none_begins(server, nightly, fineloop):
    assert server.tick(at_two() - timedelta(seconds=1)) == []
    (run,) = server.tick(at_two())
    assert run.record["recurring_run_id"] == nightly.body["recurring_run_id"]
    shown = fineloop("schedule", "show", "nightly")
    assert shown.body["live_runs"] == [run.record["run_id"]]
    assert fineloop("runs", "show", run.record["run_id"]).body["recurring_run_id"] == shown.body["recurring_run_id"]
    assert [server.tick(at_two(day)) for day in (1, 2, 3)] == [[], [], []]
    run.kill()
    assert len(server.tick(at_two(3))) == 1  # one makes up for those that were left out
    assert server.tick(at_two(3)) == []


def test_allow_lets_as_many_run_beside_each_other_as_it_says(server: KfpServer, fineloop: Fineloop) -> None:
    arguments = ("--cron", "0 2 * * *", "--overlap", "allow", "--max-concurrency", "2", *SLOW)
    answered = fineloop("schedule", "create", "nightly", *arguments)
    assert (answered.body["overlap"], answered.body["max_concurrency"]) == ("allow", 2)
    made = [len(server.tick(at_two(day))) for day in (1, 2, 3)]
    assert made == [1, 1, 0]


def test_it_runs_between_start_and_end_only(server: KfpServer, fineloop: Fineloop) -> None:
    start, end = at_two(2) - timedelta(hours=1), at_two(2) + timedelta(hours=1)
    times = ("--start", f"{start:%Y-%m-%dT%H:%M}", "--end", end.isoformat())
    answered = fineloop("schedule", "create", "once", "--cron", "0 2 * * *", *times)
    assert answered.body["next"] == [f"{at_two(2):%Y-%m-%dT%H:%M:%SZ}"]
    assert [len(server.tick(at_two(day))) for day in (1, 2, 3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cron", "0 2 * * *", "--overlap", "allow", "--max-concurrency", "11"), "1 to 10"),
        (("--cron", "0 2 * * *", "--max-concurrency", "2"), "skip means 1"),
        (("--cron", "0 2 * * *", "--end", "2026-01-01"), "no time of '0 2 * * *' comes before it"),
        (("--cron", "0 2 * * *", "--set", "train.seed=x"), "train.seed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(server, fineloop, arguments, message):
    answered = fineloop("schedule", "create", "nightly", *arguments)
    assert answered.exit_code == 2
    assert message in answered.stderr
    assert not [request for request in server.requests if request.startswith("POST")]


def test_a_name_that_is_taken_unknown_or_none_is_refused_with_the_fix(server, nightly, fineloop):
    taken = fineloop("schedule", "create", "nightly", "--cron", "@daily")
    assert taken.exit_code == 2
    assert "fineloop schedule update nightly" in taken.stderr
    assert fineloop("schedule", "create", "Every Night!", "--cron", "@daily").exit_code == 2
    for verb in ("update", "pause", "delete"):
        unknown = fineloop("schedule", verb, "nobody")
        assert unknown.exit_code == 2
        assert "fineloop schedule list" in unknown.stderr
    assert len(server.state.schedules) == 1


def made_elsewhere(server: KfpServer, nightly: Answered, name: str, cron: str, **reference: str) -> None:
    """A schedule by another client, of our pipeline unless the reference says otherwise."""
    ours = record(server, nightly)
    of = {"pipeline_id": ours["pipeline_version_reference"]["pipeline_id"]}
    of["version_id"] = ours["pipeline_version_reference"]["pipeline_version_id"]
    client = connect({}, host=server.url).client
    config: dict[str, Any] = {"config": {}}
    client.create_recurring_run(ours["experiment_id"], name, cron_expression=cron, params=config, **{**of, **reference})


def test_schedules_are_listed_and_those_of_other_pipelines_are_not(server, nightly, fineloop):
    (mine,) = server.state.versions.values()
    pipelines = connect({}, host=server.url).client.pipelines
    theirs = pipelines.pipeline_service_create_pipeline({"display_name": "theirs"}).pipeline_id
    server.state.versions["stranger"] = {**mine, "pipeline_id": theirs, "pipeline_version_id": "stranger"}
    made_elsewhere(server, nightly, "theirs", "0 0 * * * *", pipeline_id=theirs, version_id="stranger")
    made_elsewhere(server, nightly, "odd", "30 0 2 * * *")
    fineloop("schedule", "create", "weekly", "--cron", "@weekly", "--set", "adapter.name=words")
    answered = fineloop("schedule", "list")
    assert [(one["name"], one["cron"], one["kfp_cron"]) for one in answered.body["schedules"]] == [
        ("nightly", "0 2 * * *", "0 0 2 * * *"),
        ("odd", "", "30 0 2 * * *"),
        ("weekly", "0 0 * * 0", "0 0 0 * * 0"),
    ]
    assert answered.body["schedules"][2]["adapter"] == "words"
    assert "at 00:00 on Sunday" in answered.stderr
    assert "30 0 2 * * *" in answered.stderr
    assert fineloop("schedule", "delete", "theirs").exit_code == 2
    assert fineloop("schedule", "create", "theirs", "--cron", "@daily").exit_code == 2


def test_a_schedule_that_was_made_elsewhere_needs_a_cron_and_a_config_to_be_updated(server, nightly, fineloop):
    made_elsewhere(server, nightly, "odd", "30 0 2 * * *")
    update = ("schedule", "update", "odd")
    assert "give one with --cron" in fineloop(*update, "-c", str(DEFAULT_CONFIG)).stderr
    assert "give one with -c FILE" in fineloop(*update, "--cron", "@daily").stderr
    assert fineloop(*update, "--cron", "@daily", "-c", str(DEFAULT_CONFIG)).exit_code == 0


def test_a_paused_schedule_starts_nothing_and_leaves_its_run_alone(server, nightly, fineloop):
    (run,) = server.tick(at_two(1))
    paused = fineloop("schedule", "pause", "nightly")
    assert (paused.body["enabled"], paused.body["next"]) == (False, [])
    assert paused.body["live_runs"] == [run.record["run_id"]]
    assert run.record["state"] == "RUNNING"
    run.kill()
    assert server.tick(at_two(2)) == []
    assert fineloop("schedule", "update", "nightly", "--set", "train.seed=9").body["enabled"] is False
    resumed = fineloop("schedule", "resume", "nightly")
    assert resumed.body["enabled"] is True
    assert len(server.tick(at_two(3))) == 1


def test_an_update_changes_what_is_said_and_nothing_else_and_makes_the_new_one_before_it_ends_the_old(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    before = dict(record(server, nightly))
    del server.requests[:]
    answered = fineloop("schedule", "update", "nightly", "--cron", "0 4 * * mon", "--set", "train.seed=9")
    assert answered.exit_code == 0
    changes = [request for request in server.requests if "recurringruns" in request and not request.startswith("GET")]
    old = f"/recurringruns/{before['recurring_run_id']}"
    assert changes == ["POST /recurringruns", f"POST {old}:disable", f"DELETE {old}"]
    (after,) = [one.record for one in server.state.schedules.values()]
    assert after["recurring_run_id"] == answered.body["recurring_run_id"] != before["recurring_run_id"]
    assert after["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * 1"
    config = config_file.load(DEFAULT_CONFIG, ["train.seed=9"])
    assert after["runtime_config"]["parameters"] == {"config": config_file.as_table(config), "seconds": 60}
    same = ("display_name", "experiment_id", "max_concurrency", "no_catchup", "service_account", "status")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert after["pipeline_version_reference"] == before["pipeline_version_reference"]  # no config is part of it


def test_an_update_of_the_config_alone_keeps_the_times(server: KfpServer, fineloop: Fineloop) -> None:
    times = ("--cron", "15 3 * * *", "--overlap", "allow", "--end", "2999-01-01")
    before = fineloop("schedule", "create", "nightly", *times, "--service-account", "mine").body
    after = fineloop("schedule", "update", "nightly", "-c", str(DEFAULT_CONFIG), "--param", "rows=5").body
    new = ("recurring_run_id", "url", "live_runs")
    assert {**after, **{key: before[key] for key in new}} == before
    (kept,) = [one.record for one in server.state.schedules.values()]
    assert kept["runtime_config"]["parameters"]["rows"] == 5


def test_an_update_keeps_a_pinned_image_and_takes_another(server: KfpServer, fineloop: Fineloop) -> None:
    kubeflow = connect({}, host=server.url)
    pinned, newer = (f"registry.example/python@sha256:{digit * 64}" for digit in "01")
    fineloop("schedule", "create", "nightly", "--cron", "@daily", "--image", pinned)
    for change, image in ((("--cron", "@hourly"), pinned), (("--image", newer), newer), (("--image", IMAGE), "")):
        fineloop("schedule", "update", "nightly", *change)
        assert schedule.image_of(schedule.find(kubeflow, "nightly")) == image


def test_an_update_does_not_kill_a_live_run(server: KfpServer, nightly: Answered, fineloop: Fineloop) -> None:
    (run,) = server.tick(at_two(1))
    answered = fineloop("schedule", "update", "nightly", "--cron", "0 4 * * *")
    assert answered.body["live_runs"] == [run.record["run_id"]]
    # Kubeflow counts the runs of one recurring run alone, and an update has made another.
    assert f"to stop it: fineloop runs stop {run.record['run_id']}" in answered.stderr
    assert len(server.state.schedules) == 1
    assert run.record["state"] == "RUNNING"


def test_an_update_that_was_cut_off_is_mended_by_the_next(server, nightly, fineloop, monkeypatch):
    old = schedule.find(connect({}, host=server.url), "nightly")
    package = compile.make_package(config_file.load(DEFAULT_CONFIG))
    parameters = {**old.parameters, "config": config_file.as_table(package.config)}
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "delete", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            schedule.update(old, package, replace(old.timing, cron="0 5 * * *"), parameters=parameters)
    assert len(server.state.schedules) == 2
    assert len(fineloop("schedule", "list").body["schedules"]) == 1
    fineloop("schedule", "update", "nightly", "--cron", "0 6 * * *")
    (left,) = server.state.schedules.values()
    assert left.record["trigger"]["cron_schedule"]["cron"] == "0 0 6 * * *"


def test_a_failed_update_leaves_the_schedule_as_it_was(server, nightly, fineloop, monkeypatch):
    monkeypatch.setattr(server.state, "create_schedule", lambda body: 1 / 0)
    assert fineloop("schedule", "update", "nightly", "--cron", "@hourly").exit_code == 1
    (left,) = server.state.schedules.values()
    assert left.record["recurring_run_id"] == nightly.body["recurring_run_id"]
    assert left.is_enabled


def test_a_deleted_schedule_is_gone_and_its_run_goes_on(server, nightly, fineloop):
    (run,) = server.tick(at_two(1))
    answered = fineloop("schedule", "delete", "nightly")
    assert answered.body == {"name": "nightly", "deleted": True, "live_runs": [run.record["run_id"]]}
    assert server.state.schedules == {}
    assert run.record["state"] == "RUNNING"
    assert server.tick(at_two(2)) == []

    # The server ends what another client's schedule has started.
    again = fineloop("schedule", "create", "nightly", "--cron", "0 2 * * *", *SLOW)
    (run,) = server.tick(at_two(3))
    connect({}, host=server.url).client.delete_recurring_run(again.body["recurring_run_id"])
    assert run.is_over
