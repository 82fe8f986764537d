"""`fineloop schedule` against the server double: what is created, when it fires, and what a change leaves alone."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from components.config import config_file
from components.step.step import IMAGE
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import compile, schedule
from pipelines.kubeflow.client import connect
from tests.doubles.kfp_server.execution import Execution
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Answered, Fineloop

pytestmark = pytest.mark.usefixtures("small")

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


def states(runs: list[Execution]) -> list[str]:
    return [run.record["state"] for run in runs]


def test_a_schedule_is_what_was_asked_for_and_is_told_in_words(server: KfpServer, nightly: Answered) -> None:
    body = nightly.body
    assert nightly.exit_code == 0
    assert body["words"] == "at 02:00 every day"
    assert body["cron"] == "0 2 * * *"
    assert body["time_zone"] == "UTC"
    times = [datetime.fromisoformat(time) for time in body["next"]]
    assert len(times) == 5
    assert [time - times[0] for time in times] == [n * DAY for n in range(5)]
    assert datetime.now(UTC) < times[0] <= at_two()
    assert "at 02:00 every day, UTC" in nightly.stderr
    assert f"{times[0]:%Y-%m-%d %H:%M}, " in nightly.stderr

    kept = record(server, nightly)
    assert kept["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"
    assert kept["max_concurrency"] == "1"
    assert kept["no_catchup"] is True
    assert kept["service_account"] == "fineloop-pipeline"
    assert kept["status"] == "ENABLED"
    config = config_file.load(DEFAULT_CONFIG)
    assert kept["runtime_config"]["parameters"] == {"config": config_file.as_table(config), "seconds": 60}
    assert body["config_digest"] == config.digest


def test_at_its_time_it_starts_one_run(server: KfpServer, nightly: Answered, fineloop: Fineloop) -> None:
    assert server.tick(at_two() - timedelta(seconds=1)) == []
    (run,) = server.tick(at_two())
    assert server.tick(at_two()) == []
    assert run.record["recurring_run_id"] == nightly.body["recurring_run_id"]
    shown = fineloop("schedule", "show", "nightly")
    assert shown.body["live_runs"] == [run.record["run_id"]]
    assert fineloop("runs", "show", run.record["run_id"]).body["recurring_run_id"] == shown.body["recurring_run_id"]


def test_skip_lets_no_run_begin_beside_another_and_makes_up_for_one(server: KfpServer, nightly: Answered) -> None:
    (first,) = server.tick(at_two(1))
    assert server.tick(at_two(2)) == []
    assert server.tick(at_two(3)) == []
    first.kill()
    assert len(server.tick(at_two(3))) == 1
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
        (("--cron", "0 2 * * *", "--overlap", "allow", "--max-concurrency", "1"), "allow 2 to 10"),
        (("--cron", "0 2 * * *", "--end", "2026-01-01"), "no time of '0 2 * * *' comes before it"),
        (("--cron", "0 2 * * *", "--set", "train.seed=x"), "train.seed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    server: KfpServer, fineloop: Fineloop, arguments: tuple[str, ...], message: str
) -> None:
    answered = fineloop("schedule", "create", "nightly", *arguments)
    assert answered.exit_code == 2
    assert message in answered.stderr
    assert not [request for request in server.requests if request.startswith("POST")]


def test_a_name_that_is_taken_or_is_none_is_refused_with_the_fix(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    taken = fineloop("schedule", "create", "nightly", "--cron", "@daily")
    assert taken.exit_code == 2
    assert "fineloop schedule update nightly" in taken.stderr
    assert fineloop("schedule", "create", "Every Night!", "--cron", "@daily").exit_code == 2
    assert len(server.state.schedules) == 1


@pytest.mark.parametrize("verb", ["show", "update", "pause", "resume", "delete"])
def test_an_unknown_name_is_refused_with_where_to_look(server: KfpServer, fineloop: Fineloop, verb: str) -> None:
    answered = fineloop("schedule", verb, "nobody")
    assert answered.exit_code == 2
    assert "fineloop schedule list" in answered.stderr


def test_schedules_are_listed_and_those_of_others_are_not(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    kubeflow = connect({}, host=server.url)
    (mine,) = server.state.versions.values()
    theirs = kubeflow.client.pipelines.pipeline_service_create_pipeline({"display_name": "theirs"})
    stranger = {**mine, "pipeline_id": theirs.pipeline_id, "pipeline_version_id": "stranger"}
    server.state.versions["stranger"] = stranger
    kubeflow.client.create_recurring_run(
        record(server, nightly)["experiment_id"],
        "theirs",
        cron_expression="0 0 * * * *",
        pipeline_id=theirs.pipeline_id,
        version_id="stranger",
        params={"config": {}},
    )
    fineloop("schedule", "create", "weekly", "--cron", "@weekly", "--set", "adapter.name=words")
    answered = fineloop("schedule", "list")
    assert [(one["name"], one["adapter"], one["words"]) for one in answered.body["schedules"]] == [
        ("nightly", "icd10-chapters", "at 02:00 every day"),
        ("weekly", "words", "at 00:00 on Sunday"),
    ]
    assert "at 00:00 on Sunday" in answered.stderr
    assert fineloop("schedule", "delete", "theirs").exit_code == 2
    assert fineloop("schedule", "create", "theirs", "--cron", "@daily").exit_code == 2


def test_a_schedule_that_was_made_elsewhere_is_listed_and_needs_a_cron_and_a_config_to_be_updated(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    reference = record(server, nightly)["pipeline_version_reference"]
    connect({}, host=server.url).client.create_recurring_run(
        record(server, nightly)["experiment_id"],
        "odd",
        cron_expression="30 0 2 * * *",
        pipeline_id=reference["pipeline_id"],
        version_id=reference["pipeline_version_id"],
        params={"config": {}},
    )
    answered = fineloop("schedule", "list")
    assert [(one["kfp_cron"], one["cron"]) for one in answered.body["schedules"]] == [
        ("0 0 2 * * *", "0 2 * * *"),
        ("30 0 2 * * *", ""),
    ]
    assert "30 0 2 * * *" in answered.stderr
    assert "give one with --cron" in fineloop("schedule", "update", "odd", "-c", str(DEFAULT_CONFIG)).stderr
    assert "give one with -c FILE" in fineloop("schedule", "update", "odd", "--cron", "@daily").stderr
    assert fineloop("schedule", "update", "odd", "--cron", "@daily", "-c", str(DEFAULT_CONFIG)).exit_code == 0


def test_a_paused_schedule_starts_nothing_and_leaves_its_run_alone(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    (run,) = server.tick(at_two(1))
    paused = fineloop("schedule", "pause", "nightly")
    assert (paused.body["enabled"], paused.body["next"]) == (False, [])
    assert paused.body["live_runs"] == [run.record["run_id"]]
    assert states([run]) == ["RUNNING"]
    run.kill()
    assert server.tick(at_two(2)) == []
    assert fineloop("schedule", "update", "nightly", "--set", "train.seed=9").body["enabled"] is False
    resumed = fineloop("schedule", "resume", "nightly")
    assert resumed.body["enabled"] is True
    assert len(server.tick(at_two(3))) == 1


def test_an_update_changes_what_is_said_and_nothing_else(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    before = dict(record(server, nightly))
    answered = fineloop("schedule", "update", "nightly", "--cron", "0 4 * * mon", "--set", "train.seed=9")
    assert answered.exit_code == 0
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
    fineloop("schedule", "update", "nightly", "--cron", "@hourly")
    assert schedule.image_of(schedule.find(kubeflow, "nightly")) == pinned
    fineloop("schedule", "update", "nightly", "--image", newer)
    assert schedule.image_of(schedule.find(kubeflow, "nightly")) == newer
    fineloop("schedule", "update", "nightly", "--image", IMAGE)
    assert schedule.image_of(schedule.find(kubeflow, "nightly")) == ""


def test_an_update_does_not_kill_a_live_run(server: KfpServer, nightly: Answered, fineloop: Fineloop) -> None:
    (run,) = server.tick(at_two(1))
    answered = fineloop("schedule", "update", "nightly", "--cron", "0 4 * * *")
    assert answered.body["live_runs"] == [run.record["run_id"]]
    # Kubeflow counts the runs of one recurring run alone, and an update has made another.
    beside = f"run {run.record['run_id']} goes on, and the next time does not wait for its end"
    assert f"{beside}; to stop it: fineloop runs stop {run.record['run_id']}" in answered.stderr
    assert len(server.state.schedules) == 1
    assert states([run]) == ["RUNNING"]


def test_an_update_makes_the_new_one_before_it_ends_the_old(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    del server.requests[:]
    fineloop("schedule", "update", "nightly", "--cron", "@hourly")
    old = nightly.body["recurring_run_id"]
    changes = [request for request in server.requests if "recurringruns" in request and not request.startswith("GET")]
    assert changes == ["POST /recurringruns", f"POST /recurringruns/{old}:disable", f"DELETE /recurringruns/{old}"]


def test_an_update_that_was_cut_off_is_mended_by_the_next(
    server: KfpServer, nightly: Answered, fineloop: Fineloop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    old = schedule.find(connect({}, host=server.url), "nightly")
    package = compile.make_package(config_file.load(DEFAULT_CONFIG))
    parameters = {**old.parameters, "config": config_file.as_table(package.config)}
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "delete", cut_off)
        with pytest.raises(KeyboardInterrupt):
            schedule.update(old, package, replace(old.timing, cron="0 5 * * *"), parameters=parameters)
    assert len(server.state.schedules) == 2
    assert len(fineloop("schedule", "list").body["schedules"]) == 1
    fineloop("schedule", "update", "nightly", "--cron", "0 6 * * *")
    (left,) = server.state.schedules.values()
    assert left.record["trigger"]["cron_schedule"]["cron"] == "0 0 6 * * *"


def test_a_failed_update_leaves_the_schedule_as_it_was(
    server: KfpServer, nightly: Answered, fineloop: Fineloop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.state, "create_schedule", lambda body: 1 / 0)
    assert fineloop("schedule", "update", "nightly", "--cron", "@hourly").exit_code == 1
    (left,) = server.state.schedules.values()
    assert left.record["recurring_run_id"] == nightly.body["recurring_run_id"]
    assert left.is_enabled


def test_a_deleted_schedule_is_gone_and_its_run_goes_on(
    server: KfpServer, nightly: Answered, fineloop: Fineloop
) -> None:
    (run,) = server.tick(at_two(1))
    answered = fineloop("schedule", "delete", "nightly")
    assert answered.body == {"name": "nightly", "deleted": True, "live_runs": [run.record["run_id"]]}
    assert server.state.schedules == {}
    assert states([run]) == ["RUNNING"]
    assert server.tick(at_two(2)) == []
