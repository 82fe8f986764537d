"""The curve of a training in the store, and with trackers: on packages that take what wandb 0.31 and trackio take, and
on the real ones where they are installed.
"""

import importlib.util
import json
import logging
import os
import struct
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from components.config import config_file
from components.config.schema import TRACKED_RUNS, TRACKER_SECRETS_FILE, RunConfig
from components.records import runs
from components.records.steps import scalars
from components.report.charts import series
from components.shared.errors import ConfigError, StoreError
from components.store.store import Store
from ray_jobs.training import metrics_log
from ray_jobs.training.metrics_log import MetricsLog, Trackers
from tests.doubles.http_server import serving
from tests.doubles.mlflow_server import Mlflow
from tests.models.spec import spec_of


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    train = {"num_steps": 400, "elapsed_s": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0}
    return {"kind": kind, "step": step, "loss": 1.0, "records": 1, **(train if kind == "train" else {}), **values}


def points(store: Store, run_id: str, *more: str) -> list[tuple[Any, ...]]:
    """Kind and step of each record of the curve, and what else is named."""
    lines = store.get(runs.run_key(run_id, runs.METRICS)).splitlines()
    return [tuple(each[name] for name in ("kind", "step", *more)) for each in map(json.loads, lines)]


def add(log: MetricsLog, steps: Iterable[int]) -> None:
    for step in steps:
        log.add(record("train", step))


def test_after_a_restart_each_record_takes_the_place_of_the_one_before(store: Store):
    first = MetricsLog(store, "run")
    add(first, (1, 2, 3))
    first.add(record("eval", 2))  # of the third step no measurement came
    first.add(record("train", 3))
    first.upload()
    again = MetricsLog(store, "run")  # from the checkpoint of step 1
    again.add(record("train", 2, loss=0.5))
    again.add(record("eval", 2, loss=0.25))
    again.add(record("eval", 2, loss=0.125))
    again.upload()
    assert points(store, "run", "loss") == [("train", 1, 1.0), ("train", 2, 0.5), ("eval", 2, 0.125)]


def test_of_a_long_training_one_step_in_a_power_of_two_is_kept_and_every_measurement(store: Store, monkeypatch):
    monkeypatch.setattr(metrics_log, "MOST_POINTS", 100)
    log = MetricsLog(store, "long")
    for step in range(1, 1002):
        log.add(record("train", step))
        if step % 256 == 0:
            log.add(record("eval", step))
    log.upload()
    found = points(store, "long")
    assert [step for kind, step in found if kind == "eval"] == [256, 512, 768]
    assert [step for kind, step in found if kind == "train"] == [*range(16, 1001, 16), 1001]


def test_a_store_that_hangs_holds_no_step_up_and_one_that_refuses_ends_none(store: Store, monkeypatch, caplog):
    monkeypatch.setattr(metrics_log, "METRICS_EVERY_S", 0.0)
    answers, put, asked = threading.Event(), store.put, []

    def hangs_then_refuses(*arguments: Any, **more: Any) -> None:
        asked.append(arguments)
        answers.wait(timeout=60)
        if len(asked) < 3:
            raise StoreError("503 SlowDown")
        put(*arguments, **more)

    monkeypatch.setattr(Store, "put", lambda _, *arguments, **more: hangs_then_refuses(*arguments, **more))
    log = MetricsLog(store, "run")
    add(log, range(1, 101))
    assert len(asked) <= 1  # which hangs in its thread
    answers.set()
    while len(asked) < 3:
        log.add(record("train", 101))
    log.upload()
    assert points(store, "run") == [("train", step) for step in range(1, 102)]
    assert caplog.text.count("its curve is uploaded later: 503 SlowDown") == 1


def test_a_training_that_goes_on_from_a_checkpoint_has_the_curve_up_to_it(store: Store):
    log = MetricsLog(store, "run", checkpoint_every_steps=10)
    add(log, range(1, 15))
    log._thread.shutdown()  # what a killed worker leaves a second later
    assert points(store, "run") == [("train", step) for step in range(1, 11)]


def test_what_ends_a_training_leaves_its_curve_up_to_there(store: Store):
    def cut_off() -> None:
        with MetricsLog(store, "run") as log:
            add(log, range(1, 6))
            raise KeyError("as a node that is taken")

    with pytest.raises(KeyError):
        cut_off()
    assert points(store, "run") == [("train", step) for step in range(1, 6)]


def test_restarts_and_the_steps_that_they_take_twice_are_counted_over_all_of_them(store: Store):
    for first, last in ((1, 30), (21, 40), (41, 45), (41, 50)):
        log = MetricsLog(store, "often")
        add(log, range(first, last + 1))
        log.upload()
    assert (log.restarts, log.steps_repeated) == (3, 10 + 0 + 5)
    again = MetricsLog(store, "often")
    assert (again.restarts, again.steps_repeated) == (3, 15), "no step was taken yet"


def test_what_is_no_finite_number_is_null_in_the_curve(store: Store):
    log = MetricsLog(store, "overflow")
    log.add(record("train", 1, grad_norm=float("inf")))
    log.add(record("eval", 1, loss=float("nan")))
    log.upload()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = store.get(runs.run_key("overflow", runs.METRICS)).decode().splitlines()
    step, measured = (json.loads(line, parse_constant=refuse) for line in lines)
    assert step["grad_norm"] is None
    assert measured["loss"] is None
    assert scalars(measured) == {"eval/records": 1}
    assert series([step, measured], "eval", "loss") == []


STEPS = [record("train", 1, loss=2.0), record("eval", 1, loss=1.5, perplexity=float("inf")), record("train", 2)]


def tracking(*settings: str) -> RunConfig:
    text = '[adapter]\nname = "sums"\n[data]\nsource = "x.jsonl"\n[model]\nbase = "acme/base"\n'
    return config_file.loads(text, settings)


def track(config: RunConfig, records: list[dict[str, Any]]) -> None:
    """Tell the trackers of a training all of it."""
    told = Trackers(spec_of(config))
    for each in records:
        told.add(each)
    told.close()


class Run:
    """What both packages give: values by step, and an end."""

    def __init__(self, **about: Any) -> None:
        self.about, self.steps, self.is_over = about, dict[int, dict[str, float]](), False

    def log(self, metrics: dict[str, float], step: int) -> None:
        assert step >= max(self.steps, default=0), "wandb drops steps that go back"
        self.steps.setdefault(step, {}).update(metrics)

    def finish(self) -> None:
        self.is_over = True


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    runs: dict[str, Run] = {}

    def wandb_init(
        *, entity: str | None, project: str, id: str, name: str, resume: str, config: dict[str, Any], settings: Any
    ) -> Run:
        assert not set(id) & set("/\\#?%:")
        assert settings.console == "off"
        assert settings.disable_git and settings.disable_code and settings.x_disable_meta  # noqa: PT018 - all of them
        runs["wandb"] = Run(entity=entity, project=project, id=id, resume=resume, config=config)
        return runs["wandb"]

    def trackio_init(project: str, name: str, *, config: dict[str, Any], resume: str, embed: bool) -> Run:
        assert resume in ("must", "allow", "never")
        runs["trackio"] = Run(project=project, name=name, config=config)
        return runs["trackio"]

    for name, init in (("wandb", wandb_init), ("trackio", trackio_init)):
        module = ModuleType(name)
        module.init = init  # type: ignore[attr-defined] - a module made here
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["wandb"].Settings = SimpleNamespace  # type: ignore[attr-defined] - a module made here
    return runs


def test_each_tracker_that_is_named_has_the_whole_curve(store: Store, packages: dict[str, Run]) -> None:
    told = Trackers(spec_of(tracking("track.wandb=team/sums", "track.trackio=sums")))
    with MetricsLog(store, "run-1", trackers=told) as log:
        for record in STEPS:
            log.add(record)
    for run in packages.values():
        assert run.is_over
        assert {step: values["train/loss"] for step, values in run.steps.items()} == {1: 2.0, 2: 1.0}
        assert run.steps[1]["eval/loss"] == 1.5
        assert "eval/perplexity" not in run.steps[1]
        assert run.about["config"]["method"]["name"] == "qlora"
    assert (packages["wandb"].about["entity"], packages["wandb"].about["project"]) == ("team", "sums")
    assert packages["wandb"].about["id"] == packages["trackio"].about["name"] == "run-1"


def test_no_tracker_is_sent_an_address_of_data_a_store_or_a_server(packages: dict[str, Run]) -> None:
    secret = 'announce.webhook="https://hooks.example/T0/secret"'
    addresses = (secret, "track.mlflow=", 'data.source="s3://private/patients.jsonl"', "registry.bucket=our-bucket")
    track(tracking(*addresses, "track.wandb=sums", "track.trackio=sums"), [])
    for run in packages.values():
        assert {*run.about["config"]} == {"adapter", "model", "method", "train"}
        assert run.about["config"]["model"]["base"] == "acme/base"


def event_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What the event file holds."""
    (file,) = folder.glob("tensorboard/events.out.tfevents.*")
    from tensorboardX.proto.event_pb2 import Event  # once the code under test has imported the package

    body, found = file.read_bytes(), []
    while body:  # a length of 8 bytes and its checksum of 4, the message, and its checksum of 4
        (length,) = struct.unpack("<Q", body[:8])
        event = Event.FromString(body[12 : 12 + length])
        found += [(each.tag, event.step, each.simple_value) for each in event.summary.value]
        body = body[16 + length :]
    return found


def test_a_run_on_this_machine_keeps_its_curve_as_an_event_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACKED_RUNS, str(tmp_path))
    with MetricsLog(store, "run-1", trackers=Trackers(spec_of(tracking()))) as log:
        for record in STEPS:
            log.add(record)
    points = event_scalars(tmp_path / "run-1")
    assert {("train/loss", 1, 2.0), ("eval/loss", 1, 1.5), ("train/loss", 2, 1.0)} <= {*points}
    assert len(points) == len({(name, step) for name, step, _ in points})


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning_and_the_others_are_told(
    when: str, store: Store, packages: dict[str, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    if when == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    else:
        init = sys.modules["wandb"].init
        failing = {"log": lambda *_, **__: None, "finish": lambda: None, when: fails}
        monkeypatch.setattr(sys.modules["wandb"], "init", lambda **about: init(**about) and SimpleNamespace(**failing))
    track(tracking("track.wandb=sums", "track.trackio=sums"), STEPS)
    assert [each.getMessage() for each in caplog.records] == [
        "the training goes on without wandb: ConnectionError: no route to host"
    ]
    assert set(packages["trackio"].steps) == {1, 2}


def test_what_a_run_of_this_machine_left_in_its_file_is_there_for_as_long_as_its_trackers_send(
    packages: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    had: list[str | None] = []

    def noting(call: Any) -> Any:
        def noted(*given: Any, **named: Any) -> Any:
            had.append(os.environ.get("WANDB_API_KEY"))
            return call(*given, **named)

        return noted

    monkeypatch.setattr(sys.modules["wandb"], "init", noting(sys.modules["wandb"].init))
    monkeypatch.setattr(Run, "log", noting(Run.log))
    monkeypatch.setattr(Run, "finish", noting(Run.finish))
    path = tmp_path / "run-1" / TRACKER_SECRETS_FILE
    path.parent.mkdir(parents=True)
    path.write_text('{"WANDB_API_KEY": "x"}')
    for folder, settings, expected in (
        (str(tmp_path), ["track.wandb=sums"], "x"),
        (str(tmp_path / "none"), ["track.wandb=sums"], None),
        (str(tmp_path), ["track.trackio=sums"], None),
    ):
        monkeypatch.setenv(TRACKED_RUNS, folder)
        track(tracking(*settings), STEPS[:1])
        assert set(had) == {expected}
        assert "WANDB_API_KEY" not in os.environ
        had.clear()


def test_a_package_that_is_not_installed_is_named(
    packages: dict[str, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that an import finds none
    track(tracking("track.wandb=sums"), [])
    assert "track.wandb is set, and wandb is not installed beside the workers: pip install wandb" in caplog.text


def test_no_step_waits_for_a_tracker_that_hangs(
    packages: dict[str, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(metrics_log, "MOST_WAITING", 3)
    monkeypatch.setattr(metrics_log, "LAST_S", 0.05)
    init = sys.modules["wandb"].init
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **about: goes_on.wait(60) and init(**about))
    track(tracking("track.wandb=sums"), [record("train", step) for step in range(1, 20)])
    goes_on.set()
    assert "wandb lacks points of this training" in caplog.text


@pytest.mark.parametrize(
    "setting", ["track.wandb=a/b/c", "track.mlflow=http://me:secret@mlflow:5000", "track.mlflow=mlflow:5000"]
)
def test_a_target_that_is_none_or_holds_a_secret_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        tracking(setting)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed here")
@pytest.mark.parametrize("token", ["m", ""])
def test_a_real_mlflow_has_the_curve_of_a_training_that_went_on_if_the_token_is_there(
    token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger=metrics_log.__name__)
    monkeypatch.setattr(metrics_log, "LAST_S", 600)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    server = Mlflow("m")
    with serving(server.handle) as uri:
        for part in (STEPS[:2], STEPS[2:]):
            track(tracking(f"track.mlflow={uri}"), part)
    if not token:
        assert "the training goes on without mlflow" in caplog.text
        return
    (run,) = server.runs
    assert run["info"]["status"] == "FINISHED"
    newest = {each["key"]: (each["step"], each["value"]) for each in run["data"]["metrics"]}
    assert (newest["train/loss"], newest["eval/loss"]) == ((2, 1.0), (1, 1.5))
    assert {"key": "base", "value": "acme/base"} in run["data"]["params"]
    assert {each["key"] for each in run["data"]["tags"]} <= {"fineloop.run_id", "mlflow.runName"}
