"""A compiled pipeline, and its place on the server: one version for each content."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import KubeflowError
from pipelines.kubeflow.client import Kubeflow
from pipelines.kubeflow.compile import compile_pipeline

PIPELINE = "fineloop-retrain"
VERSION_DIGITS = 12


@dataclass(frozen=True)
class Package:
    """The pipeline as YAML, with one config as its default."""

    config: RunConfig
    text: str

    @property
    def spec(self) -> dict[str, Any]:
        """The pipeline's part of the YAML; the platform's, if any, is a second document."""
        spec: dict[str, Any] = next(iter(yaml.safe_load_all(self.text)))
        return spec

    @property
    def version(self) -> str:
        """The name of this content, of its sha256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:VERSION_DIGITS]

    @property
    def config_toml(self) -> str:
        """The resolved config, whole."""
        return config_file.dumps(self.config)


@dataclass(frozen=True)
class Published:
    """A version of the pipeline on the server."""

    pipeline_id: str
    version_id: str


def build(config: RunConfig, *, image: str = "") -> Package:
    """Compile the pipeline; an empty image means the project's own."""
    return Package(config, compile_pipeline(config, image=image))


def publish(kubeflow: Kubeflow, package: Package) -> Published:
    """Upload the package unless the server has the same content already."""
    pipeline_id = find_pipeline(kubeflow, PIPELINE) or _create_pipeline(kubeflow, package)
    version_id = _find_version(kubeflow, pipeline_id, package.version)
    if not version_id:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_text(package.text, encoding="utf-8")
            with kubeflow.asking("upload the pipeline"):
                made = _or_none_if_exists(
                    lambda: kubeflow.client.upload_pipeline_version(
                        str(path), package.version, pipeline_id=pipeline_id, description=package.config.adapter.name
                    )
                )
        version_id = made.pipeline_version_id if made else _find_version(kubeflow, pipeline_id, package.version)
    if not version_id:
        raise KubeflowError(f"{kubeflow.host} has version {package.version} of {PIPELINE} and does not list it")
    return Published(pipeline_id, version_id)


def find_pipeline(kubeflow: Kubeflow, name: str) -> str:
    """The id of the pipeline of this name, or an empty string."""
    namespace = kubeflow.namespace or None
    return kubeflow.id_of("pipelines", name, kubeflow.client.list_pipelines, "pipeline_id", namespace=namespace)


def _create_pipeline(kubeflow: Kubeflow, package: Package) -> str:
    """Without a version: an upload would give the first one the pipeline's name instead of its content's."""
    described = kfp_server_api.V2beta1Pipeline(
        display_name=PIPELINE,
        name=PIPELINE,
        description=package.spec["pipelineInfo"].get("description", ""),
        namespace=kubeflow.namespace or None,
    )
    with kubeflow.asking("create the pipeline"):
        made = _or_none_if_exists(lambda: kubeflow.client.pipelines.pipeline_service_create_pipeline(described))
    return made.pipeline_id if made else find_pipeline(kubeflow, PIPELINE)


def _find_version(kubeflow: Kubeflow, pipeline_id: str, name: str) -> str:
    versions = kubeflow.client.list_pipeline_versions
    return kubeflow.id_of("pipeline versions", name, versions, "pipeline_version_id", pipeline_id=pipeline_id)


def _or_none_if_exists(create: Any) -> Any:
    """None when somebody else has just created the same."""
    try:
        return create()
    except kfp_server_api.ApiException as exc:
        if exc.status == 409:
            return None
        raise
