"""A Kubeflow Pipelines server, the command line that talks to it, and a pipeline that takes no time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import pytest

from components.config import config_file
from components.config.schema import RunConfig
from pipelines import cli
from pipelines.kubeflow import compile, runs
from pipelines.kubeflow.client import connect
from pipelines.kubeflow.runs import Run
from pipelines.local.seaweedfs import Endpoint
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.doubles.kubernetes.api import KubernetesDouble
from tests.pipelines.command_line import require_documented
from tests.pipelines.kubeflow.small_pipeline import compile_small

VARIABLES = ("KFP_ENDPOINT", "KFP_TOKEN", "KFP_TOKEN_FILE", "KFP_NAMESPACE", "KUBECONFIG", "ML_PIPELINE_SERVICE_HOST")


@dataclass(frozen=True)
class Answered:
    """What a command answered; `body` is the JSON that it printed."""

    exit_code: int
    body: dict[str, Any]
    stderr: str


Fineloop = Callable[..., Answered]


@pytest.fixture
def no_kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment or at home names a server."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))


@pytest.fixture
def server(
    forked: None, no_kubeflow: None, s3_server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KfpServer]:
    """A server that the environment names, and a store."""
    with serving() as running:
        for name, value in {**s3_server.environment(), "KFP_ENDPOINT": running.url}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands send the small pipeline."""
    monkeypatch.setattr("pipelines.kubeflow.compile.compile_pipeline", compile_small)


@pytest.fixture
def fineloop(capsys: pytest.CaptureFixture[str]) -> Fineloop:
    """Run a command with --json in this process."""

    def run(*arguments: str) -> Answered:
        exit_code = cli.main([*arguments, "--json"])
        printed = capsys.readouterr()
        body = json.loads(printed.out.splitlines()[-1])
        require_documented(arguments, body)
        return Answered(exit_code, body, printed.err)

    return run


Start = Callable[..., Run]


@pytest.fixture
def start(server: KfpServer, make_config: Callable[..., RunConfig]) -> Start:
    """Starts a run of a config whose registry is the store."""

    def started(**parameters: Any) -> Run:
        built = compile.make_package(make_config())
        sent = {"config": config_file.as_table(built.config), **parameters}
        return runs.start(connect({}, host=server.url), built, parameters=sent, experiment="tries", run_name="one")

    return started


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesDouble]:
    """The API that the kubeconfig names."""
    api = KubernetesDouble(validate=False)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    yield api
    api.close()
