"""`fineloop doctor` against a live cluster that is whole, as three people see it, and against one broken in ten ways.

Kubeflow is a double, and three deployments stand in for its controllers where it is not installed.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from components.step.step import IMAGE
from pipelines.kubeflow.doctor import KUBEFLOW_CONTROLLERS
from tests.cluster.kube import ROOT, Kube, pod
from tests.doubles.kfp_server.server import serving

pytestmark = pytest.mark.cluster

Findings = Mapping[str, Mapping[str, Any]]
LAUNCHER = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kfp-launcher"}, "data": {"providers": "{}"}}


@pytest.fixture(scope="module")
def controllers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kubeflow's, or what stands in for them."""
    image = request.config.getoption("--step-image") or IMAGE
    kube = Kube(request.config.getoption("--namespace"), [], "kubeflow", tmp_path_factory.mktemp("kubeflow"))
    made = []
    for name in KUBEFLOW_CONTROLLERS:
        if not kube.get("deployment", name):
            standing_in = pod(name, {"app": name}, image, "sleep", "100000")
            template = {key: standing_in[key] for key in ("metadata", "spec")}
            template["spec"]["restartPolicy"] = "Always"
            spec = {"selector": {"matchLabels": {"app": name}}, "template": template}
            body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}
            kube.kubectl("create", "-f", "-", body=body)
            made.append(f"deployment/{name}")
    if not kube.get("configmap", "kfp-launcher"):
        kube.kubectl("create", "-f", "-", body=LAUNCHER)
        made.append("configmap/kfp-launcher")
    try:
        for name in KUBEFLOW_CONTROLLERS:
            kube.kubectl("rollout", "status", "deployment", name, "--timeout", "300s")
        yield
    finally:
        if made:
            kube.kubectl("delete", *made)


@pytest.fixture
def kubeflow(controllers: None) -> Iterator[str]:
    """The double's address."""
    with serving() as server:
        yield server.url


def asked(kube: Kube, url: str, *options: str, kubeconfig: str = "") -> Findings:
    """What doctor finds, by name."""
    keys = [word for key in kube.settings for word in ("--set", key)]
    command = ["-m", "pipelines.cli", "doctor", "--json", "--host", url, "--namespace", kube.namespace, *keys, *options]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**kube.environment, **({"KUBECONFIG": kubeconfig} if kubeconfig else {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return {found["name"]: found for found in json.loads(done.stdout.splitlines()[-1])["checks"]}


def faults(found: Findings) -> dict[str, str]:
    return {name: f"{each['detail']}: {each['fix']}" for name, each in found.items() if not each["ok"]}


def test_a_cluster_that_is_whole_has_no_fault_and_nothing_unseen(kube: Kube, kubeflow: str, step_image: str) -> None:
    found = asked(kube, kubeflow, "--image", step_image)
    assert faults(found) == {}
    assert [name for name, each in found.items() if not each["seen"]] == []


@pytest.mark.parametrize("roles", [["fineloop-reader"], ["fineloop-reader", "fineloop-submitter"]], ids="+".join)
def test_who_may_only_read_or_submit_gets_no_false_alarm(kube: Kube, kubeflow: str, roles: list[str]) -> None:
    with person(kube, roles) as kubeconfig:
        found = asked(kube, kubeflow, kubeconfig=kubeconfig)
    assert faults(found) == {}
    assert not found["nodes"]["seen"]
    assert found["rights of the steps"]["seen"] == (len(roles) == 2)
    assert found["queue"]["seen"] is False  # a ClusterQueue is the whole cluster's


@contextlib.contextmanager
def person(kube: Kube, roles: list[str]) -> Iterator[str]:
    """A kubeconfig of somebody who has these roles and no other."""
    user = f"{kube.name}-{len(roles)}"
    kube.kubectl("create", "serviceaccount", user)
    try:
        for role in roles:
            bound = [f"--role={role}", f"--serviceaccount={kube.namespace}:{user}"]
            kube.kubectl("create", "rolebinding", f"{user}-{role}", *bound)
        view = json.loads(kube.kubectl("config", "view", "--minify", "--raw", "--flatten", "-o", "json"))
        view["users"][0]["user"] = {"token": kube.kubectl("create", "token", user).strip()}
        path = Path(kube.scratch / "person")
        path.write_text(json.dumps(view), encoding="utf-8")
        yield str(path)
    finally:
        kube.kubectl("delete", "rolebinding", *(f"{user}-{role}" for role in roles), "--ignore-not-found")
        kube.kubectl("delete", "serviceaccount", user)


BROKEN: dict[str, tuple[str, Callable[[Kube], AbstractContextManager[None]]]] = {
    "KubeRay's operator has no pod": (
        "kuberay's operator",
        lambda k: k.scaled_to_none("kuberay-operator", "ray-system"),
    ),
    "Kueue's manager has no pod": (
        "kueue's manager",
        lambda k: k.scaled_to_none("kueue-controller-manager", "kueue-system"),
    ),
    "Argo's controller has no pod": ("kubeflow's controllers", lambda k: k.scaled_to_none("workflow-controller")),
    "the persistence agent has no pod": (
        "kubeflow's controllers",
        lambda k: k.scaled_to_none("ml-pipeline-persistenceagent"),
    ),
    "no node takes pods": ("nodes", lambda k: k.cordoned()),
    "the steps have no rights": ("rights of the steps", lambda k: k.without("rolebinding", "fineloop-pipeline")),
    "Ray pods have no account": ("account fineloop-trainer", lambda k: k.without("serviceaccount", "fineloop-trainer")),
    "there is no token for Ray": ("secrets/fineloop-ray", lambda k: k.without("secret", "fineloop-ray")),
    "the queue is not there": ("queue", lambda k: k.without("localqueue", "fineloop")),
    "the queue is stopped": (
        "queue",
        lambda k: k.changed(
            "clusterqueue", "fineloop", {"spec": {"stopPolicy": "Hold"}}, {"spec": {"stopPolicy": "None"}}
        ),
    ),
    "steps have no region": (
        "configmaps/fineloop-env",
        lambda k: k.changed(
            "configmap", "fineloop-env", {"data": {"AWS_REGION": None}}, {"data": {"AWS_REGION": "us-east-1"}}
        ),
    ),
    "steps have no way to the store": ("store, from a pod", lambda k: k.without("networkpolicy", "to-s3")),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_named_with_what_mends_it(kube: Kube, kubeflow: str, step_image: str, how: str) -> None:
    name, broken = BROKEN[how]
    with broken(kube):
        found = asked(kube, kubeflow, *(["--image", step_image] if name == "store, from a pod" else []))
    assert name in faults(found)
    # Without Kueue's webhook the API server takes no RayJob either.
    assert faults(found).keys() - {name} <= ({"a RayJob of this config"} if "Kueue" in how else set())
