"""A compiled pipeline, and its versions on the server: one version for each content.

Of the config it holds only the steps' time limits, labels and certificates. So versions change when the pipeline does;
they are named by release and day.
"""

import hashlib
import importlib.metadata
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import KubeflowError
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.client import Kubeflow
from pipelines.kubeflow.compile import compile_pipeline

PIPELINE = "fineloop-retrain"
ATTEMPTS = 3
"""How often a version name is tried, as another client may just have taken it."""


@dataclass(frozen=True)
class Package:
    """The pipeline as YAML, and the config to run it with."""

    config: RunConfig
    text: str

    @property
    def spec(self) -> dict[str, Any]:
        """The pipeline's part of the YAML; the platform's, if any, is a second document."""
        spec: dict[str, Any] = next(iter(yaml.safe_load_all(self.text)))
        return spec

    @property
    def content(self) -> str:
        """Identifies the content: the description of its version on the server."""
        return f"sha256 {hashlib.sha256(self.text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Published:
    """A version of the pipeline on the server."""

    pipeline_id: str
    version_id: str


def build(config: RunConfig, *, image: str = "") -> Package:
    """Compile the pipeline, with the example config as its default; an empty image means the project's image."""
    return Package(config, compile_pipeline(config, image=image, default=config_file.load(DEFAULT_CONFIG)))


def publish(kubeflow: Kubeflow, package: Package, *, today: date | None = None) -> Published:
    """Upload the package unless the server has the same content already."""
    pipeline_id = find_pipeline(kubeflow, PIPELINE) or _create_pipeline(kubeflow, package)
    day = f"{importlib.metadata.version('fineloop')}-{today or datetime.now(UTC).date()}"
    name = day
    for _ in range(ATTEMPTS):
        versions = _versions(kubeflow, pipeline_id)
        for version in versions:
            if version.description == package.content:
                return Published(pipeline_id, version.pipeline_version_id)
        taken = {version.display_name for version in versions}
        name = next(name for name in _names(day) if name not in taken)
        if made := _upload(kubeflow, pipeline_id, package, name):
            return Published(pipeline_id, made.pipeline_version_id)
    raise KubeflowError(f"{kubeflow.host} has version {name} of {PIPELINE} and does not list it")


def find_pipeline(kubeflow: Kubeflow, name: str) -> str:
    """Return the id of the pipeline of this name, or an empty string."""
    namespace = kubeflow.namespace or None
    return kubeflow.id_of("pipelines", name, kubeflow.client.list_pipelines, "pipeline_id", namespace=namespace)


def _create_pipeline(kubeflow: Kubeflow, package: Package) -> str:
    """Create the pipeline without a version: an upload would name the first one after the pipeline, not its content."""
    described = kfp_server_api.V2beta1Pipeline(
        display_name=PIPELINE,
        name=PIPELINE,
        description=package.spec["pipelineInfo"].get("description", ""),
        namespace=kubeflow.namespace or None,
    )
    with kubeflow.asking("create the pipeline"):
        made = _or_none_if_exists(lambda: kubeflow.client.pipelines.pipeline_service_create_pipeline(described))
    return made.pipeline_id if made else find_pipeline(kubeflow, PIPELINE)


def _versions(kubeflow: Kubeflow, pipeline_id: str) -> list[Any]:
    listed = kubeflow.client.list_pipeline_versions
    return [*kubeflow.listed("pipeline versions", listed, "pipeline_versions", pipeline_id=pipeline_id)]


def _names(day: str) -> Iterator[str]:
    """Yield version names for one day; they are valid names of Kubernetes objects, as which Kubeflow may store them."""
    yield day
    yield from (f"{day}.{number}" for number in itertools.count(2))


def _upload(kubeflow: Kubeflow, pipeline_id: str, package: Package, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(package.text, encoding="utf-8")
        upload = kubeflow.client.upload_pipeline_version
        with kubeflow.asking("upload the pipeline"):
            return _or_none_if_exists(
                lambda: upload(str(path), name, pipeline_id=pipeline_id, description=package.content)
            )


def _or_none_if_exists(create: Any) -> Any:
    """Return what `create` returns; None if another client has just created the same."""
    try:
        return create()
    except kfp_server_api.ApiException as exc:
        if exc.status == 409:
            return None
        raise
