"""Notifies an MLflow server of a moved alias, over its REST API (mlflow.org/docs/latest/rest-api.html, 2.0).

MLflow's own client would add a dozen packages to the image of a step for these few calls.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from components.promote.announcement import Announcement
from components.promote.http_api import HttpApi

API = "/api/2.0/mlflow"
VERSION = "fineloop.version"
"""The tag by which a version's run is found again."""


def notify(url: str, announcement: Announcement, environment: Mapping[str, str]) -> None:
    """Record the version's run and the version, each once, and set the alias.

    Raises:
        AnnounceError: the server cannot be reached, or refuses.
    """
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    api = HttpApi(f"{url.rstrip('/')}{API}", token=token, login=(user, password) if user else None)
    if api.find("/registered-models/get", name=announcement.adapter) is None:
        api.send("POST", "/registered-models/create", {"name": announcement.adapter})
    number = _find_version(api, announcement) or _create_version(api, announcement)
    alias = {"name": announcement.adapter, "alias": announcement.alias, "version": number}
    api.send("POST", "/registered-models/alias", alias)


def _find_version(api: HttpApi, announcement: Announcement) -> str | None:
    """MLflow's number of the version, found by the version's address."""
    query = f"name = '{announcement.adapter}' and source_path = '{announcement.version_uri}'"
    found = api.get("/model-versions/search", filter=query).get("model_versions", [])
    return str(found[0]["version"]) if found else None


def _create_version(api: HttpApi, announcement: Announcement) -> str:
    version = {
        "name": announcement.adapter,
        "source": announcement.version_uri,
        "run_id": _run(api, announcement),
        "tags": _tags(announcement),
    }
    return str(api.send("POST", "/model-versions/create", version)["model_version"]["version"])


def _run(api: HttpApi, announcement: Announcement) -> str:
    """The id of the version's run, in the experiment with the adapter's name. The run is created or completed; nothing
    that it has is removed."""
    name = announcement.adapter
    found = api.find("/experiments/get-by-name", experiment_name=name)
    experiment = found["experiment"] if found else api.send("POST", "/experiments/create", {"name": name})
    query = {"experiment_ids": [experiment["experiment_id"]], "filter": f"tags.`{VERSION}` = '{announcement.version}'"}
    runs = api.send("POST", "/runs/search", query).get("runs", [])
    time_ms = int(datetime.fromisoformat(announcement.time).timestamp() * 1000)
    begun = {
        "experiment_id": experiment["experiment_id"],
        "run_name": announcement.trained_by or announcement.version,
        "start_time": time_ms,
        "tags": _tags(announcement),
    }
    run = runs[0] if runs else api.send("POST", "/runs/create", begun)["run"]
    run_id = str(run["info"]["run_id"])
    metrics = [
        {"key": key, "value": value, "timestamp": time_ms, "step": 0} for key, value in announcement.metrics.items()
    ]
    params = [{"key": key, "value": getattr(announcement, key)} for key in ("method", "base", "dataset_uri")]
    api.send("POST", "/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params})
    api.send("POST", "/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": time_ms})
    return run_id


def _tags(announcement: Announcement) -> list[dict[str, Any]]:
    tags = {
        VERSION: announcement.version,
        "fineloop.run_id": announcement.trained_by,
        "fineloop.manifest_sha256": announcement.manifest_sha256,
    }
    return [{"key": key, "value": value} for key, value in tags.items()]
