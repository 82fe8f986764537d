"""A double of the package mlflow: what ray_jobs/training/metrics_log.py asks of its client, over MLflow's REST API.

A journey puts it on its person's path as mlflow.py where mlflow itself is not installed. As the real client it takes
its token from the environment, at each request.
"""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

sys.modules["mlflow.entities"] = sys.modules[__name__]


@dataclass(frozen=True)
class Metric:
    """mlflow.entities.Metric."""

    key: str
    value: float
    timestamp: int
    step: int


class MlflowClient:
    """mlflow.MlflowClient."""

    def __init__(self, tracking_uri: str) -> None:
        self._api = f"{tracking_uri}/api/2.0/mlflow"

    def _call(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = f"{self._api}/{path}?{urllib.parse.urlencode(query)}"
        headers = {"Authorization": f"Bearer {os.environ.get('MLFLOW_TRACKING_TOKEN', '')}"}
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response, object_hook=lambda found: SimpleNamespace(**found))

    def get_experiment_by_name(self, name: str) -> Any:
        try:
            return self._call("experiments/get-by-name", experiment_name=name).experiment
        except urllib.error.HTTPError as exc:
            if exc.code != 404:
                raise
            return None

    def create_experiment(self, name: str) -> str:
        return str(self._call("experiments/create", {"name": name}).experiment_id)

    def search_runs(self, experiment_ids: list[str], filter_string: str) -> list[Any]:
        found = self._call("runs/search", {"experiment_ids": experiment_ids, "filter": filter_string})
        return list(getattr(found, "runs", []))

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        listed = [{"key": key, "value": value} for key, value in tags.items()]
        about = {"experiment_id": experiment_id, "run_name": run_name, "start_time": 0, "tags": listed}
        return self._call("runs/create", about).run

    def update_run(self, run_id: str, status: str) -> None:
        self._call("runs/update", {"run_id": run_id, "status": status})

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        self._call("runs/log-parameter", {"run_id": run_id, "key": key, "value": str(value)})

    def log_batch(self, run_id: str, metrics: list[Metric]) -> None:
        self._call("runs/log-batch", {"run_id": run_id, "metrics": [asdict(each) for each in metrics]})
