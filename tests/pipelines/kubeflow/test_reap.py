from datetime import UTC, datetime
from unittest.mock import Mock

import pytest

from components.ray_cluster.backend import LiveJob
from components.shared.errors import KubeflowError
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.reap import GRACE_S, UNKNOWN_S, judge, state_on
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Fineloop

KFP_RUN = "3f0c1de2-9a4b-4c7d-8e5f-001122334455"


def job(*, age_s: float = 3600, lifetime_s: float = 86_400, kfp_run_id: str = KFP_RUN) -> LiveJob:
    return LiveJob("fineloop-r-finetune-1", "r", "finetune", kfp_run_id, age_s=age_s, lifetime_s=lifetime_s)


@pytest.mark.parametrize(
    ("state", "age_s", "is_orphan"),
    [
        *((state, 7200, True) for state in ("CANCELED", "FAILED", "SUCCEEDED", None)),
        # What the server calls a state that its agent has not reported yet (v2beta1, run.proto).
        *((state, 7200, False) for state in ("PENDING", "RUNNING", "PAUSED", "RUNTIME_STATE_UNSPECIFIED")),
        *((state, 1, True) for state in ("CANCELING", "CANCELED")),  # a person stopped it: no grace
        ("FAILED", 5, False),  # its step is about to stop it
        (None, UNKNOWN_S - 1, False),  # perhaps nobody has reported it yet
        (None, UNKNOWN_S, True),
    ],
)
def test_a_job_is_an_orphan_whose_run_is_over_gone_or_stopped(state: str | None, age_s: float, is_orphan: bool) -> None:
    assert judge(job(age_s=age_s), lambda _: state).is_orphan is is_orphan


def test_a_job_past_its_lifetime_is_an_orphan_whoever_started_it() -> None:
    old = {"age_s": 1000 + GRACE_S + 1, "lifetime_s": 1000}
    assert judge(job(**old, kfp_run_id=""), lambda _: "RUNNING").is_orphan
    assert not judge(job(age_s=1000, lifetime_s=1000, kfp_run_id=""), lambda _: None).is_orphan


def test_what_is_in_doubt_is_kept() -> None:
    away = Mock(side_effect=KubeflowError("nobody answers"))
    assert judge(job(), away).why == "its Kubeflow run cannot be asked for: nobody answers"
    assert not judge(job(), away).is_orphan
    assert not judge(job(kfp_run_id=""), lambda _: None).is_orphan


def test_the_state_of_a_run_is_asked_on_one_connection(server: KfpServer, small: None, fineloop: Fineloop) -> None:
    connections = iter([connect({}, host=server.url)])
    state_of = state_on(connections.__next__)
    run_id = fineloop("submit").body["run_id"]
    assert (state_of(run_id), state_of("gone")) == ("SUCCEEDED", None)
    server.num_outages = 1
    with pytest.raises(KubeflowError, match="503"):
        state_of(run_id)


def test_the_command_stops_the_orphan_and_keeps_the_others(server, stub_cluster, fineloop, monkeypatch):
    monkeypatch.setattr("pipelines.kubeflow.reap.UNKNOWN_S", -1.0)
    for name, about in {
        "orphan": {"fineloop_run_id": KFP_RUN, "fineloop_task": "finetune", "fineloop_kfp_run_id": KFP_RUN},
        "ad-hoc": {"fineloop_run_id": "mine", "fineloop_task": "finetune"},
        "foreign": {},
    }.items():
        body = {"submission_id": name, "entrypoint": "sleep 60", "metadata": about}
        stub_cluster.answer("POST", "/api/jobs/", body, f"Bearer {stub_cluster.token}")

    looked = fineloop("reap", "--dry-run")
    assert {each["job_id"] for each in looked.body["stopped"]} == {"orphan"}
    assert {job.status for job in stub_cluster.jobs.values()} == {"RUNNING"}

    done = fineloop("reap")
    assert done.exit_code == 0, done.stderr
    assert [each["why"] for each in done.body["stopped"]] == ["its Kubeflow run is gone"]
    assert [each["why"] for each in done.body["kept"]] == ["it was not started by Kubeflow"]
    states = {name: job.status for name, job in stub_cluster.jobs.items()}
    assert states == {"orphan": "STOPPED", "ad-hoc": "RUNNING", "foreign": "RUNNING"}


def test_a_cluster_that_refuses_hinders_no_other(no_kubeflow, kubernetes, fineloop, monkeypatch):
    """As where fineloop-env names a shared cluster that is away: the RayJobs are reaped all the same."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    about = {"labels": {"app.kubernetes.io/part-of": "fineloop"}, "annotations": {"fineloop.dev/lifetime-s": "1"}}
    kubernetes.add({"metadata": {"name": "old", **about}, "spec": {}})
    kubernetes.rayjobs["old"]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    done = fineloop("reap", "--rayjobs", "fineloop")
    assert done.exit_code == 1
    assert [each["job_id"] for each in done.body["stopped"]] == ["old"]
    assert kubernetes.rayjobs == {}
    assert "could not look at RAY_ADDRESS http://127.0.0.1:9: could not connect" in done.stderr


def test_a_rayjob_that_no_workflow_owns_is_deleted_a_day_after_its_end(no_kubeflow, kubernetes, fineloop, monkeypatch):
    """Else those of `fineloop run` and of hand-made ones fill the namespace's quota of RayJobs. KubeRay keeps them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workflow = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "1"}
    long_ago, now = "2026-01-01T00:00:00Z", datetime.now(UTC).isoformat()
    for name, owners, ended in [("old", [], long_ago), ("new", [], now), ("owned", [workflow], long_ago)]:
        labels = {"app.kubernetes.io/part-of": "fineloop"}
        kubernetes.add({"metadata": {"name": name, "labels": labels, "ownerReferences": owners}, "spec": {}})
        kubernetes.rayjobs[name]["metadata"]["creationTimestamp"] = long_ago
        status = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "endTime": ended}
        kubernetes.rayjobs[name]["status"] = status
    looked = fineloop("reap", "--dry-run", "--rayjobs", "fineloop")
    assert set(kubernetes.rayjobs) == {"old", "new", "owned"}
    done = fineloop("reap", "--rayjobs", "fineloop")
    assert [each["job_id"] for each in done.body["stopped"]] == [each["job_id"] for each in looked.body["stopped"]]
    assert set(kubernetes.rayjobs) == {"new", "owned"}
