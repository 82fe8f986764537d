"""Finding the server, saying who asks, and what is said when it does not work."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.config import kube_config

from components.shared.errors import KubeflowAway, KubeflowError, UserError
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import IN_CLUSTER, connect
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.doubles.kubernetes import kubeconfig

KUBE_PROXY = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy/"
"""Where the Kubernetes API passes requests on to Kubeflow's."""

pytestmark = pytest.mark.usefixtures("no_kubeflow")


@pytest.fixture
def guarded() -> Iterator[KfpServer]:
    with serving(token="sesame") as running:
        yield running


@pytest.fixture
def shared() -> Iterator[KfpServer]:
    with serving(namespaces=frozenset({"fineloop"})) as running:
        yield running


def test_the_host_is_the_options_the_environments_or_the_pods(guarded: KfpServer) -> None:
    with serving() as open_server:
        port = open_server.url.rpartition(":")[2]
        for found in (
            connect({"KFP_ENDPOINT": guarded.url}, host=open_server.url + "/"),
            connect({"KFP_ENDPOINT": open_server.url}),
            connect({"KF_PIPELINES_ENDPOINT": open_server.url}),
            connect({"ML_PIPELINE_SERVICE_HOST": "127.0.0.1", "ML_PIPELINE_SERVICE_PORT": port}),
        ):
            assert found.host == found.ui == open_server.url
    shown = connect({"KF_PIPELINES_UI_ENDPOINT": "https://ui/", "KFP_TOKEN": "sesame"}, host=guarded.url)
    assert shown.ui == "https://ui"


def test_in_a_pod_it_is_the_service_of_the_pods_namespace_or_else_of_kubeflow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    look_up = socket.getaddrinfo
    with serving() as running:

        def answer_for_every_name(host: str, port: int, *others: Any) -> Any:
            asked.append((host, port))
            return look_up("127.0.0.1", int(running.url.rpartition(":")[2]), *others)

        monkeypatch.setattr(socket, "getaddrinfo", answer_for_every_name)
        own = {"ML_PIPELINE_SERVICE_HOST": "10.96.0.7", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        assert connect(own).host == "http://10.96.0.7:8888"
        assert connect({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}).host == IN_CLUSTER
    assert [*dict.fromkeys(asked)] == [("10.96.0.7", 8888), ("ml-pipeline.kubeflow.svc.cluster.local", 8888)]


@pytest.mark.parametrize(("by_variable", "token"), [(False, ""), (True, "of-the-kubeconfig")])
def test_outside_it_is_behind_the_kubeconfigs_api_server(by_variable, token, tmp_path, monkeypatch):
    path = tmp_path / ("mine" if by_variable else ".kube/config")
    path.parent.mkdir(exist_ok=True)
    environment = {"KUBECONFIG": f"{tmp_path}/none{os.pathsep}{path}"} if by_variable else {}
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", environment.get("KUBECONFIG", "~/.kube/config"))
    with serving(token=token, under=KUBE_PROXY) as running:
        kubeconfig.write(path, {"server": running.url}, namespace="", token=token)
        found = connect(environment)
        assert runs.listed(found) == []
    assert (found.host, found.ui) == ("the cluster's Kubeflow Pipelines", "/pipeline")
    assert set(running.requests) == {"GET /healthz", "GET /runs"}


def test_a_kubeconfigs_token_is_asked_for_again_when_it_has_expired(tmp_path, monkeypatch):
    path, credential = tmp_path / "mine", tmp_path / "credential"
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    about = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}

    def grant(token: str) -> str:
        status = {"token": token, "expirationTimestamp": "2026-01-01T00:00:00Z"}
        credential.write_text(json.dumps({**about, "status": status}))
        return token

    with serving(token=grant("first"), under=KUBE_PROXY) as running:
        command = {"command": "cat", "args": [str(credential)], "interactiveMode": "Never"}
        asks = {"apiVersion": about["apiVersion"], **command}
        found = connect({"KUBECONFIG": str(kubeconfig.write(path, {"server": running.url}, namespace="", exec=asks))})
        running.token = grant("second")
        assert runs.listed(found) == []


def test_a_kubeconfig_that_names_no_cluster_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    path = tmp_path / ".kube" / "config"
    path.parent.mkdir()
    path.write_text("apiVersion: v1\nkind: Config\n")
    with pytest.raises(UserError, match=r"the kubeconfig names no cluster that can be asked.*--host URL"):
        connect({})


@pytest.mark.parametrize("variable", ["KFP_TOKEN", "KFP_TOKEN_FILE"])
def test_a_token_of_kubeflows_is_not_sent_to_the_kubeconfigs_cluster(variable: str, tmp_path: Path) -> None:
    path = kubeconfig.write(tmp_path / "mine", {"server": "http://127.0.0.1:1"}, namespace="")
    with pytest.raises(UserError, match=rf"{variable} is set.*unset it, or give --host"):
        connect({"KUBECONFIG": str(path), variable: str(path)})


@pytest.mark.parametrize(
    ("environment", "host", "message"),
    [
        ({}, "", "--host URL or set KFP_ENDPOINT.*port-forward"),
        ({}, "localhost:8080", "starts with http"),
        ({"KFP_TOKEN_FILE": "/nowhere/token"}, "http://127.0.0.1:1", "KFP_TOKEN_FILE is /nowhere/token, which cannot"),
    ],
    ids=["no host at all", "a host without its scheme", "a token's file that is not there"],
)
def test_a_setting_that_is_missing_or_cannot_be_used_is_a_users_mistake_and_named(environment, host, message):
    with pytest.raises(UserError, match=message):
        connect(environment, host=host)


def test_a_token_is_the_environments_or_a_files_that_is_read_again(guarded: KfpServer, tmp_path: Path) -> None:
    assert connect({"KFP_TOKEN": "sesame\n"}, host=guarded.url).host == guarded.url
    token_path = tmp_path / "token"
    token_path.write_text("sesame")
    for variable in ("KFP_TOKEN_FILE", "KF_PIPELINES_SA_TOKEN_PATH"):
        kubeflow = connect({variable: str(token_path)}, host=guarded.url)
        assert runs.listed(kubeflow) == []
    guarded.token = "renewed"
    with pytest.raises(KubeflowError, match="401"):
        runs.listed(kubeflow)
    token_path.write_text("renewed")
    assert runs.listed(kubeflow) == []


@pytest.mark.parametrize("environment", [{}, {"KFP_TOKEN": "wrong"}])
def test_a_missing_or_wrong_token_is_one_line_and_asked_once(guarded: KfpServer, environment: dict[str, str]) -> None:
    with pytest.raises(KubeflowError, match="KFP_TOKEN_FILE") as caught:
        connect(environment, host=guarded.url)
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert guarded.requests == ["GET /healthz"]


def test_an_unreachable_host_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(KubeflowAway, match=r"cannot be reached \(.*refused\)") as caught:
            connect({}, host=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "\n" not in str(caught.value)


def test_a_server_that_stops_answering_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.kubeflow.client.TIMEOUTS_S", (1.0, 0.2))
    over = threading.Event()
    with serving() as running:
        found, answer = connect({}, host=running.url), running._answer
        monkeypatch.setattr(running, "_answer", lambda *request: over.wait(30) and answer(*request))
        for ask in (lambda: runs.listed(found), lambda: connect({}, host=running.url)):
            with pytest.raises(KubeflowAway, match="timed out"):
                ask()
        over.set()


def test_a_login_page_is_not_taken_for_kubeflow(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as running:
        monkeypatch.setattr(running, "_answer", lambda *_: (200, "<html>Log in</html>"))
        with pytest.raises(KubeflowError, match="login page"):
            connect({}, host=running.url)


def test_a_server_of_many_users_wants_a_namespace_that_the_user_may_use(shared: KfpServer) -> None:
    with pytest.raises(UserError, match="--namespace"):
        connect({}, host=shared.url)
    assert runs.listed(connect({"KFP_NAMESPACE": "fineloop"}, host=shared.url)) == []
    with pytest.raises(KubeflowError, match=r"403.*no access to namespace others"):
        runs.listed(connect({}, host=shared.url, namespace="others"))


@pytest.mark.usefixtures("small")
def test_everything_happens_in_the_users_namespace(shared, fineloop, monkeypatch):
    monkeypatch.setenv("KFP_ENDPOINT", shared.url)
    where = ("--namespace", "fineloop")
    assert fineloop("submit", "--no-wait", *where).exit_code == 0
    assert fineloop("schedule", "create", "nightly", "--cron", "@daily", *where).exit_code == 0
    assert [one["namespace"] for one in shared.state.experiments.values()] == ["fineloop"]
    assert len(fineloop("runs", "list", *where).body["runs"]) == 1
    assert len(fineloop("schedule", "list", *where).body["schedules"]) == 1
