"""The suite itself, where there is no cluster: the part of it for which the doubles have what it takes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.schema import RegistryConfig
from components.store.store import Store
from pipelines.local.seaweedfs import Endpoint
from tests.doubles.jobs_api import TOKEN
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.doubles.kubernetes.api import KubernetesDouble
from tests.doubles.kubernetes.operator import Operator

ROOT = Path(__file__).resolve().parents[2]
SUITE = "tests/cluster/test_acceptance.py"
FOR_DOUBLES = "promotes_in_one_job or source_that_is_not_there or (stopped_run and trains)"


@pytest.fixture
def cluster(tmp_path: Path, s3_server: Endpoint) -> Iterator[tuple[KfpServer, KubernetesDouble, dict[str, str]]]:
    """Kubeflow, a Kubernetes with KubeRay, and an environment that leads to it and to a store."""
    package = tmp_path / "ray_jobs"
    package.mkdir()
    (package / "__init__.py").touch()
    stub = f"import runpy\nrunpy.run_path({str(ROOT / 'tests/doubles/stub_jobs.py')!r}, run_name='__main__')\n"
    (package / "candidate.py").write_text(stub)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    kubernetes = KubernetesDouble()
    operator = Operator(kubernetes, tmp_path, {**s3_server.environment(), **path})
    found = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KFP_", "RAY_", "PYTEST_"))},
        **s3_server.environment(),
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(tmp_path)},
        "KUBECONFIG": str(kubernetes.kubeconfig(tmp_path / "kubeconfig")),
    }
    with serving(found) as kubeflow:
        yield kubeflow, kubernetes, found
    operator.close()
    kubernetes.close()


@pytest.mark.full
def test_the_suite_passes_against_the_doubles_and_leaves_nothing(cluster, s3_server):
    kubeflow, kubernetes, environment = cluster
    keys = [f"registry.bucket={s3_server.bucket}", "ray.cluster.kind=rayjob", 'ray.cluster.queue=""']
    options = ["--host", kubeflow.url, *(word for key in keys for word in ("--set", key)), "-k", FOR_DOUBLES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cluster", *options, SUITE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert (kubeflow.state.runs, kubernetes.rayjobs) == ({}, {})
    assert list(Store.open(RegistryConfig(bucket=s3_server.bucket, prefix="acceptance")).list("")) == []
