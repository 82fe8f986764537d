"""Notifying an MLflow server of a moved alias, over its REST API (mlflow.org/docs/latest/rest-api.html, 2.0).

MLflow's own client is a dozen packages, which the image of a step would carry for these few calls.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from components.promote.announcement import Announcement
from components.promote.http_api import HttpApi

API = "/api/2.0/mlflow"
VERSION = "fineloop.version"
"""Tag by which a version's run is found again."""


def tell(url: str, told: Announcement, environment: Mapping[str, str]) -> None:
    """Record the version's run and the version, each once, and set the alias.

    Raises:
        AnnounceError: the server is away, or refuses.
    """
    user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN", "")
    api = HttpApi(f"{url.rstrip('/')}{API}", token=token, login=(user, password) if user else None)
    if api.find("/registered-models/get", name=told.adapter) is None:
        api.send("POST", "/registered-models/create", {"name": told.adapter})
    number = _find_version(api, told) or _create_version(api, told)
    alias = {"name": told.adapter, "alias": told.alias, "version": number}
    api.send("POST", "/registered-models/alias", alias)


def _find_version(api: HttpApi, told: Announcement) -> str | None:
    """MLflow's number of the version, which it knows by where it lies."""
    asked = f"name = '{told.adapter}' and source_path = '{told.version_uri}'"
    found = api.get("/model-versions/search", filter=asked).get("model_versions", [])
    return str(found[0]["version"]) if found else None


def _create_version(api: HttpApi, told: Announcement) -> str:
    version = {"name": told.adapter, "source": told.version_uri, "run_id": _run(api, told), "tags": _tags(told)}
    return str(api.send("POST", "/model-versions/create", version)["model_version"]["version"])


def _run(api: HttpApi, told: Announcement) -> str:
    """The run of the version, in the experiment of the adapter's name, whole; what is there of it stays."""
    found = api.find("/experiments/get-by-name", experiment_name=told.adapter)
    experiment = found["experiment"] if found else api.send("POST", "/experiments/create", {"name": told.adapter})
    asked = {"experiment_ids": [experiment["experiment_id"]], "filter": f"tags.`{VERSION}` = '{told.version}'"}
    runs = api.send("POST", "/runs/search", asked).get("runs", [])
    time_ms = int(datetime.fromisoformat(told.time).timestamp() * 1000)
    begun = {
        "experiment_id": experiment["experiment_id"],
        "run_name": told.trained_by or told.version,
        "start_time": time_ms,
        "tags": _tags(told),
    }
    run = runs[0] if runs else api.send("POST", "/runs/create", begun)["run"]
    run_id = str(run["info"]["run_id"])
    metrics = [{"key": key, "value": value, "timestamp": time_ms, "step": 0} for key, value in told.metrics.items()]
    params = [
        {"key": key, "value": value}
        for key, value in {"method": told.method, "base": told.base, "dataset_uri": told.dataset_uri}.items()
    ]
    api.send("POST", "/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params})
    api.send("POST", "/runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": time_ms})
    return run_id


def _tags(told: Announcement) -> list[dict[str, Any]]:
    tags = {VERSION: told.version, "fineloop.run_id": told.trained_by, "fineloop.manifest_sha256": told.manifest_sha256}
    return [{"key": key, "value": value} for key, value in tags.items()]
