"""One version of the pipeline for each content, also when two people publish it at the same moment."""

from collections.abc import Callable
from typing import Any

import pytest

from components.config import config_file
from components.shared.errors import KubeflowError
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.client import Kubeflow, connect
from pipelines.kubeflow.compile import Package, make_package, publish
from tests.doubles.kfp_server.errors import ApiError, exists
from tests.doubles.kfp_server.server import KfpServer

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def kubeflow(server: KfpServer) -> Kubeflow:
    return connect({}, host=server.url)


@pytest.fixture
def package() -> Package:
    return make_package(config_file.load(DEFAULT_CONFIG))


def somebody_is_first(create: Callable[..., Any]) -> Callable[..., Any]:
    """What the server answers when another request for the same came a moment before."""

    def answer(*request: Any) -> Any:
        create(*request)
        return create(*request)

    return answer


@pytest.mark.parametrize("raced", ["create_pipeline", "upload_version"])
def test_who_comes_second_by_a_moment_gets_what_the_first_one_made(
    kubeflow: Kubeflow, server: KfpServer, package: Package, monkeypatch: pytest.MonkeyPatch, raced: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.state, raced, somebody_is_first(getattr(server.state, raced)))
        published = publish(kubeflow, package)
    (pipeline,), (version,) = server.state.pipelines.values(), server.state.versions.values()
    assert published == {"pipeline_id": pipeline["pipeline_id"], "version_id": version["pipeline_version_id"]}
    assert pipeline["description"] == "Retrain nothing."
    assert publish(kubeflow, package) == published


@pytest.mark.parametrize(
    ("refused", "message"), [("create_pipeline", "create the pipeline"), ("upload_version", "upload the pipeline")]
)
def test_another_refusal_is_not_taken_for_the_race(
    kubeflow: Kubeflow, server: KfpServer, package: Package, monkeypatch: pytest.MonkeyPatch, refused: str, message: str
) -> None:
    def refuse(*_: Any) -> Any:
        raise ApiError(500, 13, "disk full")

    monkeypatch.setattr(server.state, refused, refuse)
    with pytest.raises(KubeflowError, match=rf"failed to {message} \(500: .*disk full\)"):
        publish(kubeflow, package)


def test_a_version_that_is_there_and_cannot_be_found_is_no_empty_id(
    kubeflow: Kubeflow, server: KfpServer, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise exists("The name already exist")

    monkeypatch.setattr(server.state, "upload_version", refuse)
    with pytest.raises(KubeflowError, match="failed to upload the pipeline"):
        publish(kubeflow, package)


def test_a_version_changes_when_the_pipeline_does_and_not_with_the_config(
    kubeflow: Kubeflow, server: KfpServer, package: Package
) -> None:
    other = make_package(config_file.load(DEFAULT_CONFIG, ["train.seed=9", "adapter.name=other"]))
    assert publish(kubeflow, package) == publish(kubeflow, other)
    assert publish(kubeflow, make_package(package.config, image="r/step:1")) != publish(kubeflow, package)
    assert len(server.state.versions) == 2
