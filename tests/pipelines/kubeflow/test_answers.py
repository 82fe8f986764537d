"""What is made of a real server's answers.

answers/ holds what KFP 2.17.0's API server said of three runs of the example, on a cluster with Argo 4.0.5. Left out
are the tasks' ids, pods and histories, and all of the config but its first lines.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from components.config import config_file
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.compile import compile_pipeline
from pipelines.kubeflow.runs import Run
from tests.doubles.kfp_server.server import KfpServer

ANSWERS = Path(__file__).parent / "answers"


def answer_of(server: KfpServer, name: str) -> Run:
    """The run of an answer, by way of the real client."""
    answer = json.loads((ANSWERS / f"{name}.json").read_text(encoding="utf-8"))
    spec, platform = yaml.safe_load_all(compile_pipeline(config_file.load(DEFAULT_CONFIG)))
    reference = answer["pipeline_version_reference"]
    document = {"pipeline_spec": spec, "platform_spec": platform}
    server.state.versions[reference["pipeline_version_id"]] = {**reference, "pipeline_spec": document}
    over: Any = SimpleNamespace(record=answer, is_over=True, shown=lambda: answer, kill=lambda: None)
    server.state.runs[answer["run_id"]] = over
    return runs.get(connect({}, host=server.url), answer["run_id"])


def states(run: Run) -> dict[str, str]:
    return {task.name: task.state for task in run.task_runs()}


def test_a_run_that_succeeded_left_out_the_other_branches(server: KfpServer) -> None:
    run = answer_of(server, "run-succeeded")
    assert run.state == "SUCCEEDED"
    assert {name for name, state in states(run).items() if state != "SUCCEEDED"} == {
        "Leave the alias as it is",
        "Skip the training",
    }
    assert [task.name for task in run.task_runs()][:2] == ["Prepare the data", "Fine-tune the adapter"]
    assert {task.name: task.seconds for task in run.task_runs()}["Fine-tune the adapter"] == 566


@pytest.mark.parametrize(
    ("name", "state", "failed"),
    [
        ("run-failed-step", "FAILED", {"Prepare the data"}),
        # Stopped while it trained; the server's own word for it is FAILED. The importer had failed before.
        ("run-terminated", "CANCELED", {"Fine-tune the adapter", "Register the version"}),
    ],
)
def test_what_comes_after_a_step_that_failed_was_skipped(server, name, state, failed):
    run = answer_of(server, name)
    assert run.state == state
    assert run.is_over
    assert not run.succeeded
    assert {name for name, state in states(run).items() if state == "FAILED"} == failed
    assert states(run)["Decide"] == states(run)["Promote it"] == "SKIPPED"
    assert states(run)["Write the report"] == "SUCCEEDED"
    assert {task.seconds for task in run.task_runs() if task.state == "SKIPPED"} == {None}
