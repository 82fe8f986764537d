"""One version of the pipeline for each content, also when two people publish it at the same moment."""

import importlib.metadata
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import pytest

from components.config import config_file
from components.shared.errors import KubeflowError
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.client import Kubeflow, connect
from pipelines.kubeflow.compile import PIPELINE, Package, Published, find_pipeline, make_package, publish
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
    assert published == Published(pipeline["pipeline_id"], version["pipeline_version_id"])
    assert version["description"] == package.content
    assert publish(kubeflow, package) == published


def test_a_version_that_is_there_and_cannot_be_found_is_no_empty_id(
    kubeflow: Kubeflow, server: KfpServer, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise exists("The name already exist")

    monkeypatch.setattr(server.state, "upload_version", refuse)
    with pytest.raises(KubeflowError, match=rf"has version \S+ of {PIPELINE} and does not list it"):
        publish(kubeflow, package)


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


def test_versions_are_named_by_release_and_day_and_change_when_the_pipeline_does(
    kubeflow: Kubeflow, server: KfpServer, package: Package
) -> None:
    release = importlib.metadata.version("fineloop")
    other = make_package(config_file.load(DEFAULT_CONFIG, ["train.seed=9", "adapter.name=other"]))
    assert other.text == package.text
    first = publish(kubeflow, package, today=date(2026, 11, 26))
    assert publish(kubeflow, other, today=date(2026, 11, 27)) == first
    for image, day in (("r/step:1", 26), ("r/step:2", 26), ("r/step:3", 27)):
        publish(kubeflow, make_package(package.config, image=image), today=date(2026, 11, day))
    assert [version["display_name"] for version in server.state.versions.values()] == [
        f"{release}-2026-11-26",
        f"{release}-2026-11-26.2",
        f"{release}-2026-11-26.3",
        f"{release}-2026-11-27",
    ]


def test_a_name_that_somebody_took_for_another_content_is_left_to_them(
    kubeflow: Kubeflow, server: KfpServer, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this client's look at the list and its upload."""
    upload, text = server.state.upload_version, make_package(package.config, image="r/step:1").text

    def after_somebody(given: str, query: Mapping[str, str]) -> Any:
        monkeypatch.setattr(server.state, "upload_version", upload)
        upload(text, {**query, "description": "another"})
        return upload(given, query)

    monkeypatch.setattr(server.state, "upload_version", after_somebody)
    published = publish(kubeflow, package)
    names = {version["description"]: version["display_name"] for version in server.state.versions.values()}
    assert names[package.content] == names["another"] + ".2"
    assert server.state.versions[published.version_id]["description"] == package.content


def test_an_unknown_name_is_no_pipeline(kubeflow: Kubeflow, package: Package) -> None:
    publish(kubeflow, package)
    assert find_pipeline(kubeflow, PIPELINE)
    assert find_pipeline(kubeflow, "others") == ""


def test_a_pipeline_says_what_it_does(kubeflow: Kubeflow, server: KfpServer, package: Package) -> None:
    publish(kubeflow, package)
    (pipeline,) = server.state.pipelines.values()
    assert pipeline["description"] == "Retrain nothing."
