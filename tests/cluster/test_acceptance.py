"""Fineloop on a live cluster, judged from outside: `pytest -m cluster --host URL --namespace NS --set KEY=VALUE ...`.

The cluster is one that infra/README.md has set up. `--set` fits the example to it, as $CLUSTER does there: a RayJob
for each run. AWS_ENDPOINT_URL and credentials in the environment lead to its store, and the kubeconfig to its API.
"""

import time
from typing import Any

import pytest

from pipelines.kubeflow.client import connect
from tests.cluster.kube import STOP_S
from tests.cluster.live import MINUTES, RUN_S, Live

pytestmark = pytest.mark.cluster


def states(run: dict[str, Any]) -> set[str]:
    return {step["state"] for step in run["steps"].values()}


def test_a_run_promotes_in_one_job_and_a_run_with_too_little_new_data_skips(live: Live) -> None:
    first = live.submit()
    assert first.exit_code == 0, first.stderr
    assert first.body["decision"] == "promote"
    assert live.production() == first.body["version"]
    assert f"promoted: {live.adapter}@production is now {first.body['version']}" in first.stderr
    assert states(live.run(first.body["run_id"])) == {"SUCCEEDED", "SKIPPED"}
    assert len(live.rayjobs(first.body["run_id"])) <= 1  # none after ten minutes
    second = live.submit(settings=["data.min_new_records=100000"])  # a newer release of the list may have come
    assert second.exit_code == 0, second.stderr
    assert second.body["decision"] == "skipped"
    assert live.rayjobs(second.body["run_id"]) == []
    assert live.production() == first.body["version"]


def test_a_source_that_is_not_there_is_told_in_one_sentence(live: Live) -> None:
    failed = live.submit("--param", "data_source=s3://fineloop-nobody-has-this/rows/")
    assert failed.exit_code == 1
    assert failed.body["state"] == "FAILED"
    assert "run parameter data_source" in failed.body["message"]
    assert live.rayjobs(failed.body["run_id"]) == []


@pytest.mark.parametrize("how", ["by the command", "in the page"])
@pytest.mark.parametrize("when", ["has a job", "has a head", "trains"])
def test_a_stopped_run_has_no_pod_of_ray_within_a_minute(live: Live, when: str, how: str) -> None:
    """What the page's *Terminate* asks the server for, it asks for without the command."""
    run_id = live.submit(settings=MINUTES, wait=False).body["run_id"]
    if when == "trains":
        live.training(run_id)
    elif when == "has a head":
        live.until(lambda: live.ray_pods(run_id, "ray-head"), f"{run_id} has a head", RUN_S)
    else:
        live.until(lambda: live.rayjobs(run_id), f"{run_id} has a job", RUN_S)
    began = time.monotonic()
    if how == "by the command":
        stopped = live.fineloop("runs", "stop", run_id, "--host", live.host)
        assert stopped.body["state"] == "CANCELED", stopped.stderr
    else:
        connect({}, host=live.host).client.terminate_run(run_id)
    live.until(lambda: not live.ray_pods(run_id), "no pod of Ray is left")
    took_s = time.monotonic() - began
    print(f"no pod of Ray is left after {took_s:.1f} s")
    assert took_s < STOP_S
    live.until(lambda: not live.rayjobs(run_id), "the RayJob is deleted", STOP_S)
    assert live.production() is None


@pytest.mark.parametrize("lost", ["step", "head", "worker"])
def test_a_run_that_loses_a_pod_goes_on_with_its_job(live: Live, lost: str) -> None:
    run_id = live.submit(settings=MINUTES, wait=False).body["run_id"]
    rayjob = live.training(run_id)
    cluster = f"ray.io/cluster={rayjob['status']['rayClusterName']}"
    labels = {
        "step": [f"pipeline/runid={run_id}", "pipelines.kubeflow.org/v2_component=true"],
        "head": [cluster, "ray.io/node-type=head"],
        "worker": [cluster, "ray.io/node-type=worker"],
    }[lost]
    victims = live.pods(*labels)
    assert victims, labels
    for name in victims[:1]:
        live.delete_pod(name)
    live.until(lambda: not set(victims[:1]) & set(live.pods(*labels)), f"{victims[0]} is gone")
    ended = live.ended(run_id)
    assert (ended["state"], ended["decision"]) == ("SUCCEEDED", "promote"), ended["message"]
    assert live.production() == ended["version"]
    assert {each["metadata"]["uid"] for each in live.rayjobs(run_id)} <= {rayjob["metadata"]["uid"]}


def test_a_schedule_starts_runs_one_at_a_time_and_is_updated_and_paused(live: Live) -> None:
    live.schedule("create", "--cron", "* * * * *", settings=MINUTES)
    (first,) = live.until(live.runs, "the schedule has fired", 300)
    live.training(first["run_id"])
    time.sleep(90)  # a time of the schedule falls into the run
    assert [run["run_id"] for run in live.runs()] == [first["run_id"]]
    updated = live.schedule("update", "--set", "data.min_new_records=1", "--set", "train.max_steps=6")
    assert updated.body["live_runs"] == [first["run_id"]]
    live.until(lambda: len(live.runs()) > 1, "the updated schedule has fired", 300)
    paused = live.schedule("pause")
    assert not paused.body["enabled"]
    number = len(live.runs())
    assert live.ended(first["run_id"])["decision"] == "promote"
    assert len(live.runs()) == number


def test_the_reaper_ends_a_job_whose_run_is_over(live: Live) -> None:
    over = live.submit(settings=MINUTES, wait=False).body["run_id"]
    live.fineloop("runs", "stop", over, "--host", live.host)
    run_id = live.submit(settings=MINUTES, wait=False).body["run_id"]
    rayjob = live.training(run_id)
    other = {"fineloop.dev/kfp-run-id": over}
    live.patch_rayjob(rayjob["metadata"]["name"], {"metadata": {"annotations": other}})
    live.start_reaper(f"reap-{live.adapter}")
    live.until(lambda: not live.rayjobs(run_id), "the reaper has ended it")
    assert "was stopped by someone else" in live.ended(run_id)["message"]


def test_a_job_on_a_shared_cluster_brings_its_workers(live: Live) -> None:
    """Wants infra/kuberay/raycluster, which starts without any, and its address in ConfigMap fineloop-env."""
    if not live.pods("fineloop.dev/autoscaler=true", "ray.io/node-type=head"):
        pytest.skip("the cluster has no shared RayCluster")
    answered = live.submit(settings=["ray.cluster={kind = 'jobs-api'}"])
    assert answered.exit_code == 0, answered.stderr
    assert live.production() == answered.body["version"]
    assert live.rayjobs(answered.body["run_id"]) == []
