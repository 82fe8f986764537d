"""What `fineloop submit` and `fineloop runs show` read from the store, since the server does not tell it."""

import json

import pytest

from components.records import runs as run_files
from components.store.store import Store
from pipelines.kubeflow import runs
from pipelines.kubeflow.runs import Recorded, as_json, outcome_lines
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Start

pytestmark = pytest.mark.usefixtures("small")


def steps(*numbers: int) -> bytes:
    """metrics.jsonl as the first worker writes it: a second a step, and a measurement after the last."""
    train = [
        {"kind": "train", "step": n, "num_steps": 200, "loss": 2.0 - n / 100, "elapsed_s": float(n)} for n in numbers
    ]
    return b"".join(json.dumps(each).encode() + b"\n" for each in [*train, {"kind": "eval", "step": 50, "loss": 1.4}])


def test_the_training_is_told_while_it_goes_on(start: Start, store: Store) -> None:
    run = start(seconds=60.0)
    recorded = Recorded(run)
    assert outcome_lines(run, recorded) == []
    store.put(run_files.run_key(run.run_id, run_files.METRICS), steps(49, 50))
    assert outcome_lines(run, recorded) == ["step 50 of 200, loss 1.500, about 2 min left"]
    store.put(run_files.run_key(run.run_id, run_files.METRICS), steps(199, 200))
    assert outcome_lines(run, recorded) == ["step 200 of 200, loss 0.000"]


def test_progress_is_asked_for_twice_a_minute_and_told_when_it_is_new(start: Start) -> None:
    run, lines, asked = start(seconds=2.0), [], iter(["step 1", "step 1", "step 2", "step 2"])
    clock = iter(range(0, 100_000, 20))
    runs.follow(
        run,
        lines.append,
        progress=lambda: next(asked, ""),
        sleep=lambda _: run.kubeflow.client.get_run(run.run_id),
        clock=lambda: float(next(clock)),
    )
    assert [line for line in lines if line.startswith("step")] == ["step 1", "step 2"]


def test_a_step_that_was_killed_before_it_could_say_why_is_found_by_its_log(start: Start, server: KfpServer) -> None:
    run = start(fails=True)
    server.run(run.run_id).wait()
    run = runs.follow(run, lambda _: None)
    (line,) = outcome_lines(run, Recorded(run))
    assert line.startswith("[prepare] see the log")
    assert line.endswith(f"kubectl -n fineloop logs -l pipeline/runid={run.run_id} -c main --tail 50")


def test_whoever_a_promotion_could_not_be_announced_to_is_told_with_it(start: Start, store: Store) -> None:
    run = runs.follow(start(), lambda _: None)
    about = {"adapter": "sums", "alias": "production", "run_id": run.run_id, "version": "v1"}
    store.put_json(f"runs/{run.run_id}/decision.json", {**about, "decision": "promote", "reasons": ["better"]})
    step = {"step": "promote", "status": "succeeded", "started_at": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
    outcomes = {"mlflow": "told", "webhook": "it answered 403"}
    store.put_json(f"runs/{run.run_id}/steps/promote.json", {**step, "result": {"announced": outcomes}})
    assert outcome_lines(run, Recorded(run)) == [
        "promoted: sums@production is now v1",
        "  better",
        "announce.webhook was not notified of sums@production: it answered 403; "
        "`fineloop adapters announce sums@production` notifies it again",
    ]


def test_a_store_that_cannot_be_read_from_here_is_said_and_asked_once(start, monkeypatch):
    run = runs.follow(start(), lambda _: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    recorded, opened = Recorded(run), []
    open_store = Store.open
    monkeypatch.setattr(Store, "open", lambda registry: opened.append(registry) or open_store(registry))
    assert as_json(run, recorded) == {"message": "", "decision": None, "version": None, "reasons": [], "metrics": {}}
    (line,) = outcome_lines(run, recorded)
    assert line.startswith("what it recorded cannot be read from here: ")
    assert "127.0.0.1:9" in line
    assert len(opened) == 1
