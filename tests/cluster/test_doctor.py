"""`fineloop doctor` against a live cluster that is whole, as three people see it, and against one that is broken."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kube import ROOT, Kube
from tests.cluster.live import Live

pytestmark = pytest.mark.cluster

Findings = Mapping[str, Mapping[str, Any]]


@pytest.fixture
def kubeflow(live: Live) -> str:
    """Its address."""
    return live.host


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


# What only a cluster has: Kueue's webhook, and policies that are enforced.
BROKEN: dict[str, Callable[[Kube], AbstractContextManager[None]]] = {
    "kueue's manager": lambda kube: kube.scaled_to_none("kueue-controller-manager", "kueue-system"),
    "store, from a pod": lambda kube: kube.without("networkpolicy", "to-s3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_what_mends_it(kube: Kube, kubeflow: str, step_image: str, name: str) -> None:
    with BROKEN[name](kube):
        found = faults(asked(kube, kubeflow, *(["--image", step_image] if name == "store, from a pod" else [])))
    assert name in found
    # Without Kueue's webhook the API server takes no RayJob either.
    assert found.keys() - {name} <= ({"a RayJob of this config"} if name == "kueue's manager" else set())
