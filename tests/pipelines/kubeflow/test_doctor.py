"""`fineloop doctor --host`, against what infra/overlays/kind applies, and with each thing broken in turn."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from components.config import config_file
from components.store import client
from infra.checks.manifests import INFRA, ROOT, Loader
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import doctor
from tests.doubles.http_server import serving
from tests.doubles.kfp_server.server import KfpServer
from tests.doubles.kubernetes.api import NAMESPACE, Refusal
from tests.doubles.kubernetes.applied import AppliedCluster, applied
from tests.doubles.mlflow_server import Mlflow
from tests.pipelines.kubeflow.conftest import Fineloop

RUNBOOK = (INFRA / "README.md").read_text(encoding="utf-8")
CORE = f"/api/v1/namespaces/{NAMESPACE}"
RAYJOB = tuple(
    shlex.split(next(line for line in RUNBOOK.splitlines() if line.startswith('export CLUSTER="--set'))[16:-1])
)
"""The laptop's, as the runbook gives it."""
IMAGE = ("--image", "fineloop/step:0.2.0")


@pytest.fixture
def cluster(tmp_path: Path, server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppliedCluster]:
    path = tmp_path / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(doctor, "POLL_S", 0.01)
    with applied("kind", path) as found:
        yield found


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(cluster: AppliedCluster, server: KfpServer, fineloop: Fineloop) -> Ask:
    """What doctor finds, by name; it ends with 1 when something is wrong."""

    def asked(*arguments: str) -> dict[str, Any]:
        answered = fineloop("doctor", "--host", server.url, *(arguments or RAYJOB))
        found = {check["name"]: check for check in answered.body["checks"]}
        assert answered.exit_code == (0 if all(check["ok"] for check in found.values()) else 1)
        assert all(bool(check["fix"]) is not check["ok"] for check in found.values())
        return found

    return asked


def test_a_cluster_that_the_overlay_was_applied_to_is_sound(ask: Ask, cluster: AppliedCluster) -> None:
    assert "store, from a pod" not in ask()
    assert cluster.made == []
    found = ask(*RAYJOB, *IMAGE)
    assert [check for check in found.values() if not check["ok"] or not check["seen"]] == []
    assert "honours conditional writes" in found["store, from a pod"]["detail"]
    assert len(cluster.made) == 1
    assert cluster.made[0] not in cluster.objects  # the probe is gone again


def test_each_mlflow_of_the_config_is_tried_from_the_pods_that_send_to_it(ask: Ask, cluster: AppliedCluster) -> None:
    servers = ("--set", "track.mlflow=http://a:5000", "--set", "announce.mlflow=http://b:5000/")
    cluster.pod_status, cluster.pod_log = {"phase": "Failed"}, "no way to it: connection timed out\n"
    found = ask(*RAYJOB, *IMAGE, *servers)
    for key in ("track", "announce"):
        check = found[f"{key}.mlflow, from a pod"]
        assert (check["ok"], check["detail"]) == (False, "no way to it: connection timed out")
        assert "infra/network/tracker" in check["fix"]
    labels = [pod["metadata"]["labels"] for pod in cluster.pods]
    assert [("ray.io/is-ray-node" in each, "pipelines.kubeflow.org/v2_component" in each) for each in labels] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert not set(cluster.made) & cluster.objects.keys()


@pytest.mark.parametrize(
    ("token", "given", "words"),
    [("", "", ""), ("abc", "abc", ""), ("abc", "", "it wants a token (401)"), (None, "", "no way to it: ")],
)
def test_the_script_of_a_worker_finds_its_tracker_as_the_tracker_will(token, given, words):
    with serving(Mlflow(token or "").handle) as served:
        url = "http://127.0.0.1:9" if token is None else served
        config = config_file.load(DEFAULT_CONFIG, [f"track.mlflow={url}"])
        (_, question) = doctor.probe_questions(config)
        script = question.script.replace("range(7)", "range(2)").replace("sleep(3)", "sleep(0)")
        environment = {**os.environ, "MLFLOW_TRACKING_TOKEN": given}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if words else 0)
    assert words in done.stderr


QUEUE = "/apis/kueue.x-k8s.io/v1beta2/clusterqueues/fineloop"


def _small_quota(cluster: AppliedCluster, memory: str = "8Gi") -> None:
    flavor = cluster.objects[QUEUE]["spec"]["resourceGroups"][0]["flavors"][0]
    flavor["resources"][1]["nominalQuota"] = memory


def _inactive_queue(cluster: AppliedCluster) -> None:
    inactive = {"type": "Active", "status": "False", "message": "references missing ResourceFlavor"}
    cluster.objects[QUEUE]["status"] = {"conditions": [inactive]}


@pytest.mark.parametrize(
    ("name", "break_it", "detail", "fix"),
    [
        ("namespace", lambda c: c.objects.pop(CORE), "there is no fineloop", "infra/namesp"),
        ("account fineloop-trainer", lambda c: c.drop("serviceaccounts", "fineloop-trainer"), "no such", "infra/rbac"),
        (
            "rights of the steps",
            lambda c: c.drop("rolebindings", "fineloop-pipeline"),
            "fineloop:fineloop-pipeline may not create rayjobs, get rayjobs",
            "infra/rbac",
        ),
        (
            "secrets/fineloop-ray",
            lambda c: c.put(f"{CORE}/secrets/fineloop-ray", {"data": {"token": "eA=="}}),
            "has no key auth_token",
            "make the secret",
        ),
        ("configmaps/kfp-launcher", lambda c: c.drop("configmaps", "kfp-launcher"), "has none", "make the configmap"),
        ("kuberay", lambda c: c.kinds.pop("/apis/ray.io/v1"), "ray.io/v1 is not served", "KubeRay"),
        ("queue", lambda c: c.drop("localqueues", "fineloop"), "has no LocalQueue fineloop", "ray.cluster.queue"),
        ("queue", lambda c: c.drop("clusterqueues", "fineloop"), "which is not there", "create it"),
        ("queue", _small_quota, "12 GiB asked for, at most 8 GiB given", "ray.num_workers"),
        ("queue", lambda c: c.objects[QUEUE]["spec"].update(stopPolicy="Hold"), "admits no job: stopped", "start it"),
        ("queue", _inactive_queue, "admits no job: references missing ResourceFlavor", "start it"),
        (
            "kuberay's operator",
            lambda c: c.deploy("ray-system", "kuberay-operator", 0),
            "kuberay-operator has no pod that is ready",
            "-n ray-system scale deployment kuberay-operator",
        ),
        (
            "nodes",
            lambda c: c.objects["/api/v1/nodes/node"]["spec"].update(unschedulable=True),
            "0 of 1 are ready and take pods",
            "kubectl uncordon node",
        ),
    ],
)
def test_what_is_missing_is_one_right_sentence(ask, cluster, name, break_it, detail, fix):
    break_it(cluster)
    found = ask()
    assert [wrong for wrong, check in found.items() if not check["ok"]] == [name]
    assert detail in found[name]["detail"]
    assert fix in found[name]["fix"]


def test_a_job_that_prepares_the_data_has_to_fit_the_queue_too(ask: Ask, cluster: AppliedCluster) -> None:
    _small_quota(cluster, "20Gi")
    assert ask()["queue"]["ok"]
    queue = ask(*RAYJOB, "--set", "data.engine=ray")["queue"]
    assert "36 GiB asked for, at most 20 GiB given" in queue["detail"]


def test_without_a_static_key_or_with_a_ray_cluster_that_is_shared(ask: Ask, cluster: AppliedCluster) -> None:
    cluster.drop("secrets", "fineloop-s3")
    found = ask("--namespace", NAMESPACE)
    assert "role gives access" in found["secrets/fineloop-s3"]["detail"]
    assert found["ray address"]["detail"] == "has no key RAY_ADDRESS"
    cluster.objects[f"{CORE}/configmaps/fineloop-env"]["data"]["RAY_ADDRESS"] = "http://ray-head:8265"
    assert ask("--namespace", NAMESPACE)["ray address"]["ok"]


def test_an_openlineage_server_is_told_with_a_key_that_nobody_else_can_read(ask: Ask, cluster: AppliedCluster) -> None:
    assert ask()["openlineage"]["detail"] == "not configured"
    environment = cluster.objects[f"{CORE}/configmaps/fineloop-env"]["data"]
    environment["OPENLINEAGE_URL"] = "http://marquez:5000"
    assert ask()["openlineage"]["ok"]
    cluster.put(f"{CORE}/secrets/fineloop-report", {"data": {"OPENLINEAGE_API_KEY": "eA=="}})
    assert not ask()["openlineage"]["ok"]
    environment["OPENLINEAGE_URL"] = "https://lineage.example"
    assert ask()["openlineage"]["detail"] == "https://lineage.example, with the key of secret fineloop-report"


def test_a_secret_without_which_people_get_no_message_is_missed(ask: Ask, cluster: AppliedCluster) -> None:
    people = ("--set", 'announce.people=["slack"]')
    cluster.drop("secrets", "fineloop-promote")
    assert ask(*people)["notified"]["detail"] == "people.slack; not set: FINELOOP_SLACK_WEBHOOK"
    cluster.put(f"{CORE}/secrets/fineloop-promote", {"data": {"FINELOOP_SLACK_WEBHOOK": "eA=="}})
    assert ask(*people)["notified"]["ok"]


def test_a_person_who_may_read_one_namespace_hears_what_was_not_seen_and_no_false_alarm(ask, cluster):
    """Kubernetes' own role view, in the namespace alone: no secrets, no cluster's objects, nothing to create."""
    cluster.denied = {
        *("/api/v1/nodes", "/apis/apps/v1/deployments", f"{CORE}/secrets", "/apis/authorization.k8s.io"),
        *("/apis/kueue.x-k8s.io/v1beta2/clusterqueues", "/apis/ray.io/v1/namespaces", f"{CORE}/pods"),
    }
    found = ask()
    unseen = {name for name, check in found.items() if not check["seen"]}
    assert [check for check in found.values() if not check["ok"]] == []
    assert "forbidden" in found["secrets/fineloop-ray"]["detail"]
    assert unseen == {
        *("nodes", "kuberay's operator", "kueue's manager", "queue", "rights of the steps"),
        *("secrets/fineloop-ray", "secrets/fineloop-s3", "a RayJob of this config", "a step's pod"),
    }
    assert found["kubeflow's controllers"]["seen"]


def test_a_webhook_that_is_away_is_not_taken_for_a_wrong_version(ask, cluster, monkeypatch):
    why = 'Internal error occurred: failed calling webhook "mrayjob.kb.io": no endpoints available for service'
    monkeypatch.setattr(cluster, "_create", Mock(side_effect=Refusal(500, "InternalError", why)))
    found = ask()
    assert found["a RayJob of this config"]["detail"] == f"refused: {why}"
    assert found["a RayJob of this config"]["fix"].startswith("start what answers it")


WAITING = {"reason": "ImagePullBackOff", "message": "Back-off pulling image x"}
PULLING = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": WAITING}}]}
UNPLACED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}


@pytest.mark.parametrize(
    ("status", "log", "detail"),
    [
        ({"phase": "Failed"}, "Traceback\nStoreError: no bucket fineloop\n", "no bucket fineloop"),
        (PULLING, "", "ImagePullBackOff: Back-off pulling image x"),
        ({"phase": "Pending", "conditions": [UNPLACED]}, "", "no node takes the pod: 0/1 nodes are available"),
    ],
)
def test_a_store_or_an_image_that_pods_cannot_reach_is_told(ask, cluster, monkeypatch, status, log, detail):
    monkeypatch.setattr(doctor, "UNPLACED_S", 0.0)
    cluster.pod_status, cluster.pod_log = status, log
    found = ask(*RAYJOB, *IMAGE)["store, from a pod"]
    assert not found["ok"]
    assert detail in found["detail"]
    assert cluster.made[0] not in cluster.objects


def test_the_rights_that_are_asked_for_are_those_that_infra_grants() -> None:
    roles = yaml.load_all((INFRA / "rbac" / "pipeline.yaml").read_text(encoding="utf-8"), Loader=Loader)
    granted = {
        (rule["apiGroups"][0], resource): set(rule["verbs"])
        for role in roles
        if role["kind"] == "Role"
        for rule in role["rules"]
        if "resourceNames" not in rule
        for resource in rule["resources"]
    }
    assert granted.keys() == doctor.RIGHTS.keys()
    for what, verbs in doctor.RIGHTS.items():
        assert set(verbs) <= granted[what]


def test_a_probe_asks_nothing_before_the_policies_apply_to_its_pod() -> None:
    """Until then a pod reaches what they forbid: shown on a node whose firewall follows a pod's start by seconds."""
    cluster: Any = SimpleNamespace(namespace=NAMESPACE)
    (container,) = doctor.probe_pod(cluster, "", "image", "print('asked')")["spec"]["containers"]
    assert container["command"][-1].splitlines() == [f"import time; time.sleep({doctor.SETTLED_S})", "print('asked')"]


def test_the_script_of_the_probe_tries_the_store_and_asks_again_for_what_its_policies_may_open(s3_server):
    """In a process, as in a pod."""
    script = doctor.TRY.format(attempts=client.ATTEMPTS + 1, bucket=s3_server.bucket, prefix="probe")
    script = script.replace("client.ATTEMPTS_", "client.BUSY_PAUSE_S = 0.01; client.ATTEMPTS_")
    for endpoint, words in ((s3_server.url, "the store is sound"), ("http://127.0.0.1:9", "cannot be reached")):
        pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": endpoint}
        environment = {**os.environ, **s3_server.environment(), **pod}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        said = (done.stdout + done.stderr).decode()
        assert words in said.splitlines()[-1]
        assert ("trying again" in said) == ("127.0.0.1:9" in endpoint)
