"""Notifies a Kubeflow Model Registry of a moved alias, over its REST API (kubeflow/hub, api/openapi).

The registry's own Python client is not used: it configures logging and patches asyncio for the whole process, and has
no timeouts. The registry has no aliases: each is a property of the registered model, with the version as its value.
"""

from collections.abc import Mapping
from typing import Any

from components.promote.announcement import Announcement
from components.promote.http_api import HttpApi

TOKEN = "FINELOOP_MODEL_REGISTRY_TOKEN"
API = "/api/model_registry/{version}"
NEWEST, OLDER = "v1", "v1alpha3"
"""Versions of the API, with the same requests. Servers from before 2026 know only the older one, which is to end with
April 2027."""
AUTHOR = "fineloop"


def notify(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Register the adapter, the version and its address, each once, and point the alias at the version.

    Raises:
        AnnounceError: the registry cannot be reached, or refuses.
    """
    api = _newest_api(url.rstrip("/"), environment.get(TOKEN, ""))
    model = api.find("/registered_model", name=announcement.adapter) or api.send(
        "POST", "/registered_models", {"name": announcement.adapter, "owner": AUTHOR}
    )
    version = api.find("/model_version", name=announcement.version, parentResourceId=model["id"]) or api.send(
        "POST",
        "/model_versions",
        {
            "name": announcement.version,
            "registeredModelId": model["id"],
            "author": AUTHOR,
            "customProperties": _properties(announcement),
        },
    )
    artifacts = f"/model_versions/{version['id']}/artifacts"
    if not api.get(artifacts).get("items"):
        # Named like the model, because the registry's client looks for it by that name: get_model_artifact.
        artifact = {
            "artifactType": "model-artifact",
            "name": announcement.adapter,
            "uri": announcement.version_uri,
            "state": "LIVE",
        }
        api.send("POST", artifacts, {**artifact, "modelFormatName": "peft", "modelFormatVersion": "1"})
    properties = {**model.get("customProperties", {}), announcement.alias: _text(announcement.version)}
    api.send("PATCH", f"/registered_models/{model['id']}", {"customProperties": properties})


def _newest_api(url: str, token: str) -> HttpApi:
    newest, older = (HttpApi(url + API.format(version=version), token=token) for version in (NEWEST, OLDER))
    return older if newest.find("/registered_models", pageSize="1") is None else newest


def _properties(announcement: Announcement) -> dict[str, Any]:
    same = ("manifest_sha256", "method", "base", "dataset_uri")
    texts = {"run_id": announcement.trained_by, **{key: getattr(announcement, key) for key in same}}
    numbers = {
        key: {"metadataType": "MetadataDoubleValue", "double_value": value}
        for key, value in announcement.metrics.items()
    }
    return {**{key: _text(value) for key, value in texts.items()}, **numbers}


def _text(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}
