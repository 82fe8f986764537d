"""A double of MLflow's server: what `components/handover/announce.py` and the client's package ask of its API, answered
as MLflow 3.17 does."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tests.doubles.http_server import Answer

API = "/api/2.0/mlflow"


class Mlflow:
    """Its `handle` answers a request; `token` is what each must bear."""

    def __init__(self, token: str = "") -> None:
        self._token = token
        self._experiments: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self._models: dict[str, dict[str, Any]] = {}

    def handle(self, verb: str, path: str, query: Mapping[str, str], body: bytes, headers: Mapping[str, str]) -> Answer:
        if self._token and headers.get("Authorization") != f"Bearer {self._token}":
            return 401, "You are not authenticated."
        call = getattr(self, "_" + re.sub(r"\W", "_", f"{verb} {path.removeprefix(API + '/')}").lower(), None)
        if call is None:
            return 404, {"error_code": "ENDPOINT_NOT_FOUND"}
        return call(**(json.loads(body) if body else query))

    def _get_experiments_get_by_name(self, experiment_name: str) -> Answer:
        if experiment_name not in self._experiments:
            return _missing(f"Could not find experiment with name '{experiment_name}'")
        number = str(self._experiments.index(experiment_name))
        return 200, {"experiment": {"experiment_id": number, "name": experiment_name}}

    def _post_experiments_create(self, name: str) -> Answer:
        if name in self._experiments:
            return _exists(f"Experiment(name={name})")
        self._experiments.append(name)
        return 200, {"experiment_id": str(len(self._experiments) - 1)}

    def _post_runs_search(self, experiment_ids: list[str], filter: str, **_: Any) -> Answer:
        wanted = re.fullmatch(r"tags\.`([^`]+)` = '([^']+)'", filter)
        assert wanted
        tag, near = {"key": wanted[1], "value": wanted[2]}, set(experiment_ids)
        found = [run for run in self.runs if run["info"]["experiment_id"] in near and tag in run["data"]["tags"]]
        return 200, {"runs": found} if found else {}

    def _post_runs_create(
        self, experiment_id: str, run_name: str, start_time: int, tags: list[Any], **_: Any
    ) -> Answer:
        info = {"run_id": f"{len(self.runs):032x}", "experiment_id": experiment_id, "run_name": run_name}
        info |= {"run_uuid": info["run_id"], "artifact_uri": "mlflow-artifacts:/none", "user_id": ""}
        run = {"info": {**info, "status": "RUNNING", "start_time": start_time}, "data": {"tags": tags}}
        self.runs.append(run)
        return 200, {"run": run}

    def _get_runs_get(self, run_id: str, **_: Any) -> Answer:
        return 200, {"run": self.runs[int(run_id, 16)]}

    def _post_runs_log_batch(
        self, run_id: str, metrics: list[Any] | None = None, params: list[Any] | None = None, **_: Any
    ) -> Answer:
        data = self.runs[int(run_id, 16)]["data"]
        for field, given in (("metrics", metrics), ("params", params)):
            newest = {each["key"]: each for each in [*data.get(field, []), *(given or [])]}
            data[field] = list(newest.values())
        return 200, {}

    def _post_runs_log_parameter(self, run_id: str, key: str, value: str, **_: Any) -> Answer:
        return self._post_runs_log_batch(run_id, params=[{"key": key, "value": value}])

    def _post_runs_update(self, run_id: str, status: str, **_: Any) -> Answer:
        self.runs[int(run_id, 16)]["info"].update(status=status)
        return 200, {"run_info": self.runs[int(run_id, 16)]["info"]}

    def _get_registered_models_get(self, name: str) -> Answer:
        model = self._models.get(name)
        return _missing(f"Registered Model with name={name} not found") if model is None else (200, _shown(model))

    def _post_registered_models_create(self, name: str) -> Answer:
        if name in self._models:
            return _exists(f"Registered Model (name={name})")
        self._models[name] = {"name": name, "versions": [], "aliases": {}}
        return 200, _shown(self._models[name])

    def _get_model_versions_search(self, filter: str) -> Answer:
        wanted = re.fullmatch(r"name = '([^']+)' and source_path = '([^']+)'", filter)
        assert wanted
        versions = self._models.get(wanted[1], {"versions": []})["versions"]
        found = [each for each in versions if each["source"] == wanted[2]]
        return 200, {"model_versions": found} if found else {}

    def _post_model_versions_create(self, name: str, source: str, run_id: str, tags: list[Any]) -> Answer:
        versions = self._models[name]["versions"]
        version = {"name": name, "version": str(len(versions) + 1), "source": source, "run_id": run_id, "tags": tags}
        versions.append(version)
        return 200, {"model_version": version}

    def _post_registered_models_alias(self, name: str, alias: str, version: str) -> Answer:
        self._models[name]["aliases"][alias] = version
        return 200, {}

    def _get_registered_models_alias(self, name: str, alias: str) -> Answer:
        number = self._models[name]["aliases"][alias]
        return 200, {"model_version": self._models[name]["versions"][int(number) - 1]}


def _shown(model: dict[str, Any]) -> dict[str, Any]:
    aliases = [{"alias": alias, "version": version} for alias, version in model["aliases"].items()]
    return {"registered_model": {"name": model["name"], **({"aliases": aliases} if aliases else {})}}


def _missing(message: str) -> Answer:
    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": message}


def _exists(what: str) -> Answer:
    return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": f"{what} already exists."}
