import json
import threading
from typing import Any

import pytest

from components.records import runs
from components.records.steps import scalars
from components.report.charts import series
from components.shared.errors import StoreError
from components.store.store import Store
from ray_jobs.training import metrics_log
from ray_jobs.training.metrics_log import MetricsLog


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    train = {"num_steps": 400, "elapsed_s": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0}
    return {"kind": kind, "step": step, "loss": 1.0, "records": 1, **(train if kind == "train" else {}), **values}


def test_after_a_restart_each_record_takes_the_place_of_the_one_before(store: Store):
    first = MetricsLog(store, "run")
    for step in (1, 2, 3):
        first.add(record("train", step))
    first.add(record("eval", 2))  # of the third step no measurement came
    first.add(record("train", 3))
    first.upload()
    again = MetricsLog(store, "run")  # from the checkpoint of step 1
    again.add(record("train", 2, loss=0.5))
    again.add(record("eval", 2, loss=0.25))
    again.add(record("eval", 2, loss=0.125))
    again.upload()
    body, _ = store.read(runs.run_key("run", runs.METRICS))
    found = [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, body.splitlines())]
    assert found == [("train", 1, 1.0), ("train", 2, 0.5), ("eval", 2, 0.125)]


def points(store: Store, run_id: str) -> list[tuple[str, int]]:
    body, _ = store.read(runs.run_key(run_id, runs.METRICS))
    return [(r["kind"], r["step"]) for r in map(json.loads, body.splitlines())]


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
    for step in range(1, 101):
        log.add(record("train", step))
    assert len(asked) <= 1  # which hangs in its thread
    answers.set()
    while len(asked) < 3:
        log.add(record("train", 101))
    log.upload()
    assert points(store, "run") == [("train", step) for step in range(1, 102)]
    assert caplog.text.count("its curve is uploaded later: 503 SlowDown") == 1


def test_a_training_that_goes_on_from_a_checkpoint_has_the_curve_up_to_it(store: Store):
    log = MetricsLog(store, "run", checkpoint_every_steps=10)
    for step in range(1, 15):
        log.add(record("train", step))
    log._thread.shutdown()  # what a killed worker leaves a second later
    assert points(store, "run") == [("train", step) for step in range(1, 11)]


def test_what_ends_a_training_leaves_its_curve_up_to_there(store: Store):
    def cut_off() -> None:
        with MetricsLog(store, "run") as log:
            for step in range(1, 6):
                log.add(record("train", step))
            raise KeyError("as a node that is taken")

    with pytest.raises(KeyError):
        cut_off()
    assert points(store, "run") == [("train", step) for step in range(1, 6)]


def test_restarts_and_the_steps_that_they_take_twice_are_counted_over_all_of_them(store: Store):
    for first, last in ((1, 30), (21, 40), (41, 45), (41, 50)):
        log = MetricsLog(store, "often")
        for step in range(first, last + 1):
            log.add(record("train", step))
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
