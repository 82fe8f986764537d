"""One version of the pipeline for each content, also when two people publish it at the same moment."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from components.config import config_file
from components.shared.errors import KubeflowError, UserError
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
def test_who_comes_second_by_a_moment_gets_what_the_first_one_made(kubeflow, server, package, monkeypatch, raced):
    with monkeypatch.context() as patch:
        patch.setattr(server.state, raced, somebody_is_first(getattr(server.state, raced)))
        published = publish(kubeflow, package)
    (pipeline,), (version,) = server.state.pipelines.values(), server.state.versions.values()
    assert published == {"pipeline_id": pipeline["pipeline_id"], "version_id": version["pipeline_version_id"]}
    assert pipeline["description"] == "Retrain nothing."
    assert publish(kubeflow, package) == published


def test_a_version_changes_when_the_pipeline_does_and_not_with_the_config(kubeflow, server, package):
    other = make_package(config_file.load(DEFAULT_CONFIG, ["train.seed=9", "adapter.name=other"]))
    assert publish(kubeflow, package) == publish(kubeflow, other)
    assert publish(kubeflow, make_package(package.config, image="r/step:1")) != publish(kubeflow, package)
    assert len(server.state.versions) == 2


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        ("create_pipeline", ApiError(500, 13, "disk full"), r"create the pipeline \(500: .*disk full\)"),
        ("upload_version", ApiError(500, 13, "disk full"), r"upload the pipeline \(500: .*disk full\)"),
        ("upload_version", exists("The name already exist"), "upload the pipeline"),  # and cannot be found
    ],
)
def test_another_refusal_is_not_taken_for_the_race(kubeflow, server, package, monkeypatch, refused, error, message):
    def refuse(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(server.state, refused, refuse)
    with pytest.raises(KubeflowError, match=f"failed to {message}"):
        publish(kubeflow, package)


def test_the_server_refuses_what_is_no_pipeline(kubeflow: Kubeflow, package: Package) -> None:
    """The double, that is, as the real one does."""
    odd = yaml.safe_dump({**yaml.safe_load(package.text), "surprise": 1})
    with pytest.raises(UserError, match='no field named "surprise"'):
        publish(kubeflow, replace(package, text=odd))
