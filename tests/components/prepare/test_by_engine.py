"""The prepare step whose data a Ray job prepares. The job runs in this process, and reads without Ray, which
tests/ray_jobs/test_prepare.py has."""

from collections.abc import Callable
from typing import Any

import pytest

from components.config.schema import RunConfig
from components.prepare import by_engine
from components.prepare.by_engine import prepared
from components.prepare.validate import read_here
from components.records import runs
from components.registry import between_runs
from components.shared.errors import DataError, JobError
from components.step.step import StepRun
from components.store.store import Store
from ray_jobs import prepare as ray_job

ROWS = [{"id": i, "prompt": f"question {i}", "completion": f"answer {i % 7}"} for i in range(200)]
Write = Callable[..., str]
Prepare = Callable[..., StepRun]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How each job was submitted; `lost` in place of a run's id leaves no result."""
    found: list[dict[str, Any]] = []

    def submit(step_run: StepRun, task: str, *arguments: str, **where: Any) -> str:
        found.append({"task": task, "arguments": arguments, **where})
        if step_run.run_id != "lost":
            ray_job.prepare_run(step_run.config, run_id=step_run.run_id, is_decided="--decided" in arguments)
        return "job-1"

    monkeypatch.setattr(by_engine, "submit_step", submit)
    monkeypatch.setattr(ray_job, "read_on_ray", read_here)
    return found


@pytest.fixture
def run(store: Store, write_rows: Write, run_config: Callable[..., RunConfig]) -> Prepare:
    source = write_rows([*ROWS, {"prompt": "no answer"}])

    def step(engine: str, run_id: str, **data: Any) -> StepRun:
        config = run_config(source, engine=engine, **{"eval_share": 0.4, **data})
        here = {"bucket": store.bucket, "prefix": store.prefix}
        config = config.model_copy(update={"registry": config.registry.model_copy(update=here)})
        return StepRun("prepare", run_id, config, store)

    return step


def test_a_ray_job_leaves_the_step_with_what_it_would_have_had_itself(run: Prepare, submitted, store: Store) -> None:
    here, there = run("local", "here"), run("ray", "there")
    expected, found = prepared(here), prepared(there)
    (job,) = submitted
    assert (job["task"], job["arguments"], job["ray"].use_gpu) == ("prepare", (), False)
    assert (found.dataset_id, found.summary, found.rejected) == (expected.dataset_id, expected.summary, 1)
    assert there.result == {**here.result, "created": False}
    consumed = (runs.find(store, run_id, between_runs.Consumed) for run_id in ("here", "there"))
    ids = [between_runs.consumed_contents(store, each).to_pylist() for each in consumed]
    assert sorted(ids[0]) == sorted(ids[1])


def test_a_job_in_which_too_little_is_new_skips_the_run(run: Prepare, submitted, store: Store) -> None:
    prepared(run("local", "first"))
    between_runs.advance_watermark(store, "test", "first")
    later = run("ray", "second", min_new_records=1)
    assert prepared(later) is None
    assert later.result["skipped"].startswith("nothing new since run first")
    assert submitted


def test_where_a_gate_decides_the_job_knows_it(run: Prepare, submitted: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"gate\.min_records"):
        prepared(run("ray", "there", eval_share=0.05), is_decided=True)
    assert submitted[0]["arguments"] == ("--decided",)


def test_a_job_that_left_no_result_is_an_error_that_names_it(run: Prepare, submitted: list[dict[str, Any]]) -> None:
    with pytest.raises(JobError, match="Ray job job-1 succeeded without its result"):
        prepared(run("ray", "lost"))
