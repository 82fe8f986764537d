"""Jobs on a live Kubernetes with KubeRay and Kueue, whatever happens to them there. No Kubeflow is needed.

`pytest -m cluster tests/cluster --set KEY=VALUE ...` against the kubeconfig's context, which infra/README.md has set up
but for its step 3. `--set` fits the example to it, as $CLUSTER does there. Each job is one that the queue holds at one
time; some tests restart the operators, so the cluster is nobody else's meanwhile.
"""

import signal
import time

import pytest

from components.ray_cluster.rayjob import HOPELESS_S
from tests.cluster.away import Proxy
from tests.cluster.kube import SOON_S, Followed, Kube, until

pytestmark = pytest.mark.cluster

SLEEPS = "import sys, time; print('be' 'gan', flush=1); time.sleep(float(sys.argv[1])); print('is ' 'done', flush=1)"
"""Its words in two parts each, for Ray repeats the command in the log."""
TRAINS = ("train.max_steps=80", "train.epochs=100", "train.early_stopping_patience=0")
STOP_S = 60.0  # by when nothing of a stopped job may hold a processor


def sleeping(kube: Kube, seconds: int, *settings: str) -> Followed:
    return kube.start("python", "-c", SLEEPS, str(seconds), settings=settings)


def quota_in_use(kube: Kube) -> str:
    flavors = kube.get("localqueue", "fineloop")["status"]["flavorsUsage"]
    return next(r["total"] for flavor in flavors for r in flavor["resources"] if r["name"] == "cpu")


def test_a_job_is_admitted_runs_and_gives_back_what_it_took(kube: Kube) -> None:
    job = sleeping(kube, 5)
    assert job.end() == 0, job.text
    assert "queued by Kueue" in job.text or "waiting for pods" in job.text
    assert job.text.index("began") < job.text.index("is done")
    assert kube.rayjob(job.run_id)["status"]["jobStatus"] == "SUCCEEDED"
    kube.nothing_is_left(job.run_id)
    until(lambda: quota_in_use(kube) == "0", "Kueue has its quota back")


@pytest.mark.parametrize("when", ["waiting for pods", "began"])
def test_a_job_whose_step_is_stopped_is_gone_within_a_minute(kube: Kube, when: str) -> None:
    job = sleeping(kube, 600)
    job.says(when)
    job.process.send_signal(signal.SIGTERM)
    assert kube.nothing_is_left(job.run_id) < STOP_S
    assert job.end() != 0
    assert kube.rayjob(job.run_id) == {}


@pytest.mark.parametrize("lost", ["head", "submitter"])
def test_a_job_that_loses_its_head_or_submitter_ends_well_under_its_first_name(kube: Kube, lost: str) -> None:
    job = sleeping(kube, 45)
    job.says("began")
    uid = kube.rayjob(job.run_id)["metadata"]["uid"]
    (victim,) = kube.pods_of(job.run_id, lost)
    kube.kubectl("delete", "pod", victim, "--wait=false")
    assert job.end() == 0, job.text
    assert kube.rayjob(job.run_id)["metadata"]["uid"] == uid


@pytest.mark.parametrize("step", [6, 20, 40])
@pytest.mark.parametrize("lost", [("worker",), ("head",), ("head", "worker")], ids=" and ".join)
def test_a_training_that_loses_pods_goes_on_from_a_checkpoint(kube: Kube, lost: tuple[str, ...], step: int) -> None:
    """Their node is gone at once: no pod has a last second."""
    job = kube.train(*TRAINS)
    job.has_trained(step, 2 * SOON_S)
    uid = kube.rayjob(job.run_id)["metadata"]["uid"]
    victims = [pod for component in lost for pod in kube.pods_of(job.run_id, component)]
    victims = victims[:1] if lost == ("worker",) else victims
    kube.kubectl("delete", "pod", *victims, "--grace-period", "0", "--force")
    assert job.end(2400) == 0, job.text
    assert "promoted: " in job.text
    assert "resum" in job.text
    assert kube.rayjob(job.run_id)["metadata"]["uid"] == uid
    kube.nothing_is_left(job.run_id)


@pytest.mark.parametrize("number", range(10))
def test_a_short_run_promotes_and_leaves_what_goes_with_its_rayjob(kube: Kube, number: int) -> None:
    before = kube.everything()
    job = kube.train()
    assert job.end() == 0, job.text
    assert "promoted: " in job.text
    kube.nothing_is_left(job.run_id)
    until(lambda: quota_in_use(kube) == "0", "Kueue has its quota back")
    assert not {"pvc", "pv", "raycluster.ray.io"} & {name.partition("/")[0] for name in kube.everything() - before}
    kube.clean_up()
    until(lambda: kube.everything() <= before, f"run {number} has left nothing")


def test_what_is_scheduled_takes_the_place_of_what_a_person_started_which_runs_again_after_it(kube: Kube) -> None:
    """Wants a quota that holds one job at a time."""
    mine = sleeping(kube, 60, "ray.cluster.priority_class=fineloop-adhoc")
    mine.says("began")
    urgent = sleeping(kube, 20, "ray.cluster.priority_class=fineloop-scheduled")
    mine.says("reempted")
    assert urgent.end() == 0, urgent.text
    assert mine.end() == 0, mine.text
    assert mine.text.count("began") == 2


def test_a_job_that_never_fits_its_queue_ends_in_minutes_with_kueues_words(kube: Kube) -> None:
    began = time.monotonic()
    job = sleeping(kube, 1, "ray.cluster.worker.cpu=1000")
    assert job.end() != 0
    assert "never fits its queue: raise the quota or ask for less" in job.text
    assert "maximum capacity" in job.text
    assert time.monotonic() - began > HOPELESS_S
    until(lambda: kube.rayjob(job.run_id) == {}, "it is deleted")


def test_a_step_whose_api_server_is_away_for_a_minute_follows_its_job_to_the_end(kube: Kube) -> None:
    with Proxy(kube) as proxy:
        job = kube.start("python", "-c", SLEEPS, "90", environment={"KUBECONFIG": str(proxy.kubeconfig)})
        job.says("began")
        with proxy.cut():
            time.sleep(60)
        assert job.end() == 0, job.text
        assert "is done" in job.text


@pytest.mark.parametrize("operator", [("kuberay-operator", "ray-system"), ("kueue-controller-manager", "kueue-system")])
@pytest.mark.parametrize("when", ["RayJob: ", "began"], ids=["starting", "running"])
def test_an_operator_that_is_restarted_in_the_middle_harms_no_job(kube, operator, when):
    name, namespace = operator
    job = sleeping(kube, 45)
    job.says(when)
    kube.kubectl("rollout", "restart", f"deployment/{name}", namespace=namespace)
    assert job.end() == 0, job.text
    kube.kubectl("rollout", "status", f"deployment/{name}", "--timeout", "300s", namespace=namespace)
    assert job.text.count("began") == 1


def test_the_reaper_ends_a_job_that_nobody_waits_for_and_keeps_the_others(kube: Kube) -> None:
    """By the cluster's own CronJob, which looks every minute."""
    orphan = sleeping(kube, 900)
    orphan.says("began")
    name = kube.rayjob(orphan.run_id)["metadata"]["name"]
    orphan.process.kill()
    orphan.end()
    time.sleep(150)  # the grace that a job has which is past its time
    assert kube.rayjob(orphan.run_id)["metadata"]["name"] == name
    kube.kubectl("annotate", "rayjob", name, "fineloop.dev/lifetime-s=1", "--overwrite")
    assert kube.nothing_is_left(orphan.run_id) < 3 * STOP_S
