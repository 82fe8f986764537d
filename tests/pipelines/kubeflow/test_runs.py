"""`fineloop submit` and `fineloop runs` against the server double, with the real kfp.Client between them."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from kfp import compiler, dsl

from components.config import config_file
from components.records import runs as run_files
from components.shared.errors import KubeflowAway, KubeflowError, UserError
from components.step.step import COMPONENT
from components.store.store import Store
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.compile import compile_pipeline
from pipelines.kubeflow.runs import Recorded, Run, as_json, outcome_lines
from tests.doubles.jobs_api import JobsApi
from tests.doubles.kfp_server.errors import invalid
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.command_line import ROOT
from tests.pipelines.kubeflow.conftest import Fineloop, Start
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.usefixtures("small")


def test_a_run_that_succeeds_is_exit_0_and_tells_each_step(server: KfpServer, fineloop: Fineloop) -> None:
    named = ("--run-name", "first", "--experiment", "tries")
    answered = fineloop("submit", "-c", str(DEFAULT_CONFIG), "--set", "adapter.name=mine", *named)
    body = answered.body
    assert answered.exit_code == 0
    assert (body["run_name"], body["state"], body["adapter"]) == ("first", "SUCCEEDED", "mine")
    assert body["url"] == f"{server.url}/#/runs/details/{body['run_id']}"
    done = dict.fromkeys(("prepare", "finetune", "gate", "promote"), "SUCCEEDED")
    assert body["steps"] == {**done, "hold": "SKIPPED"}
    lines = answered.stderr.splitlines()
    assert any(line.startswith("[gate] succeeded after") for line in lines), lines
    assert body["url"] in lines[0]

    record = server.run(body["run_id"]).record
    config = config_file.load(DEFAULT_CONFIG, ["adapter.name=mine"])
    assert body["config_digest"] == config.digest
    assert record["runtime_config"]["parameters"] == {"config": config_file.as_table(config)}
    assert record["service_account"] == "fineloop-pipeline"
    assert server.state.experiments[record["experiment_id"]]["display_name"] == "tries"


def test_a_run_that_fails_is_exit_1_and_says_which_step(server: KfpServer, fineloop: Fineloop) -> None:
    answered = fineloop("submit", "--param", "fails=true")
    assert answered.exit_code == 1
    assert answered.body["state"] == "FAILED"
    assert answered.body["steps"]["prepare"] == "FAILED"
    assert "[prepare] failed after" in answered.stderr
    logs = f"kubectl -n fineloop logs -l pipeline/runid={answered.body['run_id']} -c main"
    assert logs in answered.body["message"]


def test_the_wait_ends_when_the_run_is_canceled(server, start, tmp_path):
    run = start(seconds=60.0, folder=str(tmp_path))
    (pid_path,) = wait_until(lambda: list(tmp_path.glob("*.pid")))
    run.kubeflow.client.terminate_run(run.run_id)
    ended = runs.follow(run, lambda _: None, sleep=lambda _: time.sleep(0.05))
    assert (ended.state, ended.succeeded) == ("CANCELED", False)
    wait_until(lambda: not Path(f"/proc/{pid_path.read_text()}").exists())


SUBMIT_SMALL = """
import sys
from pipelines import cli
from pipelines.kubeflow import compile
from tests.pipelines.kubeflow.small_pipeline import compile_small
compile.compile_pipeline = compile_small
sys.exit(cli.main(["submit", *sys.argv[1:]]))
"""


def test_an_interrupted_wait_leaves_the_run_and_says_how_to_stop_it(server: KfpServer, tmp_path: Path) -> None:
    arguments = ["--param", "seconds=60", "--param", f"folder={tmp_path}", "--json"]
    command = [sys.executable, "-W", "ignore", "-c", SUBMIT_SMALL, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    submitted = Popen(command, cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE, text=True)
    (pid_path,) = wait_until(lambda: list(tmp_path.glob("*.pid")))
    submitted.send_signal(signal.SIGINT)
    out, err = submitted.communicate(timeout=PATIENCE_S)
    assert submitted.returncode == 130
    assert f"fineloop runs stop {pid_path.stem}" in err
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
    assert server.run(pid_path.stem).record["state"] == "RUNNING"


@pytest.mark.parametrize(
    "arguments", [("--param", "rows=many"), ("--set", "train.learning_rat=1"), ("-c", "none.toml")]
)
def test_a_mistake_is_told_before_anything_is_sent(server, fineloop, arguments):
    assert fineloop("submit", *arguments).exit_code == 2
    assert server.requests == []


def test_an_image_and_another_account_reach_the_server(server: KfpServer, fineloop: Fineloop) -> None:
    image = f"registry.example/python@sha256:{'0' * 64}"
    answered = fineloop("submit", "--no-wait", "--image", image, "--service-account", "")
    assert "service_account" not in server.run(answered.body["run_id"]).record
    (version,) = server.state.versions.values()
    assert image in json.dumps(version["pipeline_spec"])


def test_a_server_that_is_away_for_a_while_is_asked_again(server, start):
    run, lines = start(), []
    server.num_outages = 2
    ended = runs.follow(run, lines.append, sleep=lambda _: time.sleep(0.05))
    assert ended.state == "SUCCEEDED"
    assert [line for line in lines if "asking again" in line] == [lines[0]]


def test_a_server_that_stays_away_ends_the_wait_and_says_that_the_run_goes_on(server, start):
    run = start()
    server.num_outages = 1000
    clock = iter(range(0, 100_000, 60)).__next__
    with pytest.raises(KubeflowAway) as caught:
        runs.follow(run, lambda _: None, sleep=lambda _: None, clock=clock)
    assert f"fineloop runs show {run.run_id}" in caught.value.__notes__[0]


def test_what_only_the_server_can_know_is_told_in_its_words(server, start):
    with pytest.raises(Exception, match="mode has value 'slow', which is not one of") as caught:
        start(mode="slow")
    assert caught.value.exit_code == 2
    server.num_outages = 1
    with pytest.raises(KubeflowError, match="503"):
        runs.listed(connect({}, host=server.url))


@pytest.fixture
def three(server: KfpServer, fineloop: Fineloop) -> list[str]:
    """One that promoted, one that failed, both of `sums`; one under way, of `words`, in another experiment."""
    sums, words = ("--set", "adapter.name=sums"), ("--set", "adapter.name=words", "--experiment", "tries")
    good, bad, slow = (
        fineloop("submit", "--no-wait", "--run-name", name, *arguments).body["run_id"]
        for name, arguments in (
            ("good", sums),
            ("bad", (*sums, "--param", "fails=true")),
            ("slow", (*words, "--param", "seconds=60")),
        )
    )
    assert (server.run(good).wait(), server.run(bad).wait()) == ("SUCCEEDED", "FAILED")
    return [good, bad, slow]


def names(fineloop: Fineloop, *arguments: str) -> set[str]:
    answered = fineloop("runs", "list", *arguments)
    assert answered.exit_code == 0
    return {run["run_name"] for run in answered.body["runs"]}


def test_runs_are_listed_by_adapter_experiment_and_state(
    three: list[str], fineloop: Fineloop, server: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dsl.component(**COMPONENT)
    def others() -> None:
        """Not ours."""

    compiler.Compiler().compile(others, str(tmp_path / "others.yaml"))
    client, path = connect({}, host=server.url).client, str(tmp_path / "others.yaml")
    client.create_run_from_pipeline_package(path, run_name="others", experiment_name="tries")
    assert names(fineloop) == {"good", "bad", "slow"}
    assert names(fineloop, "--adapter", "sums") == {"good", "bad"}
    assert names(fineloop, "--experiment", "tries") == {"slow"}
    assert names(fineloop, "--state", "failed") == {"bad"}
    assert names(fineloop, "--adapter", "sums", "--state", "succeeded") == {"good"}
    assert names(fineloop, "--adapter", "sums", "--limit", "1") < {"good", "bad"}
    assert fineloop("runs", "list", "--experiment", "none").exit_code == 2
    # More runs than fit on a page.
    monkeypatch.setattr("pipelines.kubeflow.client.PAGE_SIZE", 1)
    assert {run.run_id for run in runs.listed(connect({}, host=server.url))} == set(three)


def test_a_run_is_found_by_id_or_name_and_shown_with_its_steps_and_digest(three, fineloop, server):
    answered = fineloop("runs", "show", three[0][:13])
    body = answered.body
    assert (body["run_id"], body["state"], body["adapter"]) == (three[0], "SUCCEEDED", "sums")
    assert body["config_digest"] == config_file.load(DEFAULT_CONFIG, ["adapter.name=sums"]).digest
    assert body["store_run_id"] == three[0]
    assert [*body["steps"]] == ["prepare", "finetune", "gate", "promote", "hold"]
    assert body["steps"]["hold"] == {"state": "SKIPPED", "began": None, "ended": None, "seconds": None}
    prepare = body["steps"]["prepare"]
    assert prepare["state"] == "SUCCEEDED"
    assert prepare["began"] <= prepare["ended"]
    assert prepare["seconds"] >= 0
    assert re.search(r"prepare +succeeded +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC +\d+ s", answered.stderr)

    assert fineloop("runs", "show", "bad").body["run_id"] == three[1]
    assert fineloop("runs", "show", "nobody").exit_code == 2
    with pytest.raises(UserError, match="fits 3 runs"):
        runs.find(connect({}, host=server.url), "")


def test_a_stopped_run_is_canceled_and_one_that_is_over_stays_as_it_is(three, fineloop, server):
    answered = fineloop("runs", "stop", three[2])
    assert answered.exit_code == 0
    assert answered.body == {"run_id": three[2], "state": "CANCELED", "stopped": True, "jobs": []}
    assert "its Ray jobs are left to its steps and to the cluster's `fineloop reap`" in answered.stderr
    assert server.run(three[2]).record["state"] == "FAILED"
    assert names(fineloop, "--state", "canceled") == {"slow"}
    del server.requests[:]
    for run_id, state in ((three[1], "FAILED"), (three[2], "CANCELED")):
        over = fineloop("runs", "stop", run_id)
        assert (over.exit_code, over.body["state"], over.body["stopped"]) == (0, state, False)
    assert not [request for request in server.requests if request.endswith(":terminate")]


@pytest.fixture
def slow(server: KfpServer, fineloop: Fineloop) -> str:
    return str(fineloop("submit", "--no-wait", "--param", "seconds=60").body["run_id"])


def test_a_run_that_may_not_be_stopped_or_will_not_end_is_told_of(slow: str, server: KfpServer) -> None:
    run = runs.get(connect({}, host=server.url), slow)
    execution = server.run(slow)
    end = execution.terminate
    execution.terminate = Mock(side_effect=invalid("not today"))
    with pytest.raises(UserError, match=f"refuses to stop run {slow}: Invalid input error: not today"):
        runs.stop(run)
    execution.terminate = lambda: None
    with pytest.raises(KubeflowError, match=f"still RUNNING after 0 s: see {server.url}"):
        runs.stop(run, timeout_s=0.0)
    end()
    assert runs.stop(run)[0].state == "CANCELED"  # one that is being stopped already is awaited


def test_the_ray_jobs_of_a_stopped_run_are_stopped_from_here_once_its_steps_are_being_ended(
    slow: str, fineloop: Fineloop, stub_cluster: JobsApi
) -> None:
    for name, run_id in {"its": slow, "others": "another"}.items():
        about = {"fineloop_run_id": run_id, "fineloop_task": "candidate"}
        body = {"submission_id": name, "entrypoint": "sleep 60", "metadata": about}
        stub_cluster.answer("POST", "/api/jobs/", body, f"Bearer {stub_cluster.token}")
    assert fineloop("runs", "stop", slow).body["jobs"] == ["its"]
    assert {name: job.status for name, job in stub_cluster.jobs.items()} == {"its": "STOPPED", "others": "RUNNING"}


def test_the_rayjobs_of_a_stopped_run_are_looked_for_where_its_config_has_them(server, kubernetes, fineloop):
    arguments = ("--set", "ray.cluster={kind='rayjob'}", "--param", "seconds=60")
    run_id = fineloop("submit", "--no-wait", *arguments).body["run_id"]
    for name, of in {"its": run_id, "others": "another"}.items():
        labels = {"app.kubernetes.io/part-of": "fineloop", "fineloop.dev/run-id": of, "fineloop.dev/task": "candidate"}
        kubernetes.add({"metadata": {"name": name, "labels": labels}, "spec": {}})
    answered = fineloop("runs", "stop", run_id)
    assert answered.body["jobs"] == ["its"]
    assert [*kubernetes.rayjobs] == ["others"]


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
    clock, get_run = iter(range(0, 100_000, 20)).__next__, run.kubeflow.client.get_run
    runs.follow(run, lines.append, progress=lambda: next(asked, ""), sleep=lambda _: get_run(run.run_id), clock=clock)
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


ANSWERS = Path(__file__).parent / "answers"
"""What KFP 2.17.0's API server said of three runs of the example, on a cluster with Argo 4.0.5. Left out are the tasks'
ids, pods and histories, and all of the config but its first lines."""


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


def task_states(run: Run) -> dict[str, str]:
    return {task.name: task.state for task in run.task_runs()}


def test_a_run_that_succeeded_left_out_the_other_branches(server: KfpServer) -> None:
    run = answer_of(server, "run-succeeded")
    assert run.state == "SUCCEEDED"
    left_out = {name for name, state in task_states(run).items() if state != "SUCCEEDED"}
    assert left_out == {"Leave the alias as it is", "Skip the training"}
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
    assert {name for name, state in task_states(run).items() if state == "FAILED"} == failed
    assert task_states(run)["Decide"] == task_states(run)["Promote it"] == "SKIPPED"
    assert task_states(run)["Write the report"] == "SUCCEEDED"
    assert {task.seconds for task in run.task_runs() if task.state == "SKIPPED"} == {None}
