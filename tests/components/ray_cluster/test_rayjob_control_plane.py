"""A RayJob on a real API server: rights, refusals, races and watches as Kubernetes words and times them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.config.ray import RayConfig
from components.ray_cluster.backend import Job
from components.ray_cluster.kubernetes_api import KubernetesApi
from components.ray_cluster.rayjob_manifest import rayjob
from components.ray_cluster.submit import connect, stop_run
from components.shared.errors import JobError
from tests.components.ray_cluster.submitting import submitting
from tests.doubles.jobs_api import TOKEN
from tests.doubles.kubernetes.control_plane import NAMESPACE, ControlPlane, RayJobsOfCluster, needs_control_plane
from tests.doubles.kubernetes.operator import Operator
from tests.waiting import PATIENCE_S, wait_until

pytestmark = needs_control_plane

RAY = RayConfig.model_validate({"cluster": {"kind": "rayjob"}})


def body(run_id: str, **spec: Any) -> dict[str, Any]:
    found = rayjob(RAY, Job(run_id, "finetune", ("true",), 60), 1, namespace=NAMESPACE, owner=None)
    found["spec"] |= spec
    return found


@pytest.fixture
def as_account(control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Become a service account of infra/rbac."""
    return lambda name: monkeypatch.setenv("KUBECONFIG", str(control_plane.account(name)))


@pytest.fixture
def operator(control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setattr("components.ray_cluster.rayjob_manifest.BACKOFF_LIMIT", 0)
    rayjobs = RayJobsOfCluster(control_plane)
    found = Operator(rayjobs, tmp_path, {})
    yield found
    found.close()
    rayjobs.clear()


@pytest.mark.parametrize("account", ["fineloop-reaper", "fineloop-trainer"])
def test_an_account_without_the_right_is_told_which_and_where_it_comes_from(as_account, account) -> None:
    as_account(account)
    with pytest.raises(JobError, match=f"{account} may not create rayjobs.*kubectl apply -k infra/rbac"):
        KubernetesApi().create(body("denied"))


def test_the_reaper_can_stop_what_a_step_started(as_account, operator, tmp_path) -> None:
    as_account("fineloop-pipeline")
    waiting = Job("left-behind", "finetune", ("python", "-c", "import time; time.sleep(60)"), 60)
    step = subprocess.Popen(submitting(waiting, RAY), stderr=subprocess.PIPE)
    wait_until(lambda: any(state == "Running" for _, state in operator.history), "the job does not run")
    as_account("fineloop-reaper")
    assert [job.run_id for job in connect(RAY).live()] == ["left-behind"]
    assert stop_run("left-behind", RAY) == ["fineloop-left-behind-finetune-1"]
    _, stderr = step.communicate(timeout=PATIENCE_S)
    assert b"was stopped by someone else" in stderr
