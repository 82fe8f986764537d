"""`fineloop runs`: which runs there are, what became of their steps, and how one is stopped."""

import re
from pathlib import Path

import pytest
from kfp import compiler, dsl

from components.config import config_file
from components.shared.errors import KubeflowError, UserError
from components.step.step import COMPONENT
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import connect
from tests.doubles.jobs_api import JobsApi
from tests.doubles.kfp_server.errors import invalid
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Fineloop

pytestmark = pytest.mark.usefixtures("small")


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

    def refuse() -> None:
        raise invalid("not today")

    execution.terminate = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"refuses to stop run {slow}: Invalid input error: not today"):
        runs.stop(run)
    execution.terminate = lambda: None  # type: ignore[method-assign]
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
