"""Trackers, on packages that take what wandb 0.31 and trackio take, and on the real ones where they are installed."""

import importlib.util
import logging
import os
import struct
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from components.config import config_file
from components.config.schema import TRACKED_RUNS, TRACKER_SECRETS_FILE, RunConfig
from components.shared.errors import ConfigError
from components.store.store import Store
from ray_jobs.training import metrics_log
from ray_jobs.training.metrics_log import MetricsLog, Trackers
from tests.doubles.http_server import serving
from tests.doubles.mlflow_server import Mlflow
from tests.models.spec import spec_of

TRAIN = {"kind": "train", "num_steps": 2, "elapsed_s": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0}
STEPS: list[dict[str, Any]] = [
    {**TRAIN, "step": 1, "loss": 2.0},
    {"kind": "eval", "step": 1, "loss": 1.5, "records": 9, "perplexity": float("inf")},
    {**TRAIN, "step": 2, "loss": 1.0},
]


def config(*settings: str) -> RunConfig:
    text = '[adapter]\nname = "sums"\n[data]\nsource = "x.jsonl"\n[model]\nbase = "acme/base"\n'
    return config_file.loads(text, settings)


class Run:
    """What both packages give: values by step, and an end."""

    def __init__(self, **about: Any) -> None:
        self.about, self.steps, self.is_over = about, dict[int, dict[str, float]](), False

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
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
    told = Trackers(spec_of(config("track.wandb=team/sums", "track.trackio=sums")))
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
    Trackers(spec_of(config(*addresses, "track.wandb=sums", "track.trackio=sums"))).close()
    for run in packages.values():
        assert {*run.about["config"]} == {"adapter", "model", "method", "train"}
        assert run.about["config"]["model"]["base"] == "acme/base"


def scalars(folder: Path) -> list[tuple[str, int, float]]:
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
    with MetricsLog(store, "run-1", trackers=Trackers(spec_of(config()))) as log:
        for record in STEPS:
            log.add(record)
    points = scalars(tmp_path / "run-1")
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
    told = Trackers(spec_of(config("track.wandb=sums", "track.trackio=sums")))
    for record in STEPS:
        told.add(record)
    told.close()
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
    for runs, settings, expected in (
        (str(tmp_path), ["track.wandb=sums"], "x"),
        (str(tmp_path / "none"), ["track.wandb=sums"], None),
        (str(tmp_path), ["track.trackio=sums"], None),
    ):
        monkeypatch.setenv(TRACKED_RUNS, runs)
        told = Trackers(spec_of(config(*settings)))
        told.add(STEPS[0])
        told.close()
        assert set(had) == {expected}
        assert "WANDB_API_KEY" not in os.environ
        had.clear()


def test_a_package_that_is_not_installed_is_named(
    packages: dict[str, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that an import finds none
    told = Trackers(spec_of(config("track.wandb=sums")))
    told.close()
    assert "track.wandb is set, and wandb is not installed beside the workers: pip install wandb" in caplog.text


def test_no_step_waits_for_a_tracker_that_hangs(
    packages: dict[str, Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(metrics_log, "MOST_WAITING", 3)
    monkeypatch.setattr(metrics_log, "LAST_S", 0.05)
    init = sys.modules["wandb"].init
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **about: goes_on.wait(60) and init(**about))
    told = Trackers(spec_of(config("track.wandb=sums")))
    for step in range(1, 20):
        told.add({"kind": "train", "step": step, "loss": 1.0})
    told.close()
    goes_on.set()
    assert "wandb lacks points of this training" in caplog.text


@pytest.mark.parametrize(
    "setting", ["track.wandb=a/b/c", "track.mlflow=http://me:secret@mlflow:5000", "track.mlflow=mlflow:5000"]
)
def test_a_target_that_is_none_or_holds_a_secret_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        config(setting)


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
            told = Trackers(spec_of(config(f"track.mlflow={uri}")))
            for record in part:
                told.add(record)
            told.close()
    if not token:
        assert "the training goes on without mlflow" in caplog.text
        return
    (run,) = server.runs
    assert run["info"]["status"] == "FINISHED"
    newest = {each["key"]: (each["step"], each["value"]) for each in run["data"]["metrics"]}
    assert (newest["train/loss"], newest["eval/loss"]) == ((2, 1.0), (1, 1.5))
    assert {"key": "base", "value": "acme/base"} in run["data"]["params"]
    assert {each["key"] for each in run["data"]["tags"]} <= {"fineloop.run_id", "mlflow.runName"}
