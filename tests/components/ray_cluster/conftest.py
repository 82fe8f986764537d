"""KubeRay on a double of the Kubernetes API, for jobs that are RayJobs."""

import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.config.ray import RayConfig
from components.ray_cluster import submit
from components.ray_cluster.backend import Job
from components.ray_cluster.submit import submit_and_wait
from tests.doubles.jobs_api import TOKEN
from tests.doubles.kubernetes.api import KubernetesDouble, Resource
from tests.doubles.kubernetes.operator import Operator
from tests.waiting import PATIENCE_S


@dataclass
class Cluster:
    """KubeRay on the API double."""

    api: KubernetesDouble
    operator: Operator
    caplog: pytest.LogCaptureFixture

    def submit(
        self, code: str, *, timeout_s: float = PATIENCE_S, output: io.StringIO | None = None, **cluster: Any
    ) -> str:
        job = Job("r", "finetune", ("python", "-u", "-c", code), timeout_s)
        return submit_and_wait(job, config(**cluster), output=output or io.StringIO())

    def when(self, holds: Callable[[Resource], bool], act: Callable[[str], None]) -> None:
        """Act once, on the first RayJob that `holds` is true of."""

        def wait() -> None:
            with self.api.changed:
                while not self.api.is_closed:
                    found = next((name for name, each in self.api.rayjobs.items() if holds(each)), None)
                    if found:
                        break
                    self.api.changed.wait(0.2)
                else:
                    return
            act(found)

        threading.Thread(target=wait, daemon=True).start()


def config(**cluster: Any) -> RayConfig:
    return RayConfig.model_validate({"cluster": {"kind": "rayjob", **cluster}})


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.05)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Cluster]:
    api = KubernetesDouble()
    operator = Operator(api, tmp_path, {})
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr("components.ray_cluster.rayjob_manifest.BACKOFF_LIMIT", 0)
    caplog.set_level("INFO", logger="components")
    yield Cluster(api, operator, caplog)
    operator.close()
    api.close()
