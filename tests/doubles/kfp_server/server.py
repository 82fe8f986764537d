"""A double of the Kubeflow Pipelines API server (v2beta1) on loopback, for the real `kfp.Client`.

It refuses what the real one refuses and runs what is submitted, each run under kfp.local in a session of its own.
`tick` does what the schedule controller does at a moment.
"""

import contextlib
import email
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from tests.doubles import http_server
from tests.doubles.http_server import Answer
from tests.doubles.kfp_server.errors import ApiError, missing
from tests.doubles.kfp_server.execution import Execution
from tests.doubles.kfp_server.listing import page
from tests.doubles.kfp_server.state import State

PREFIX = "/apis/v2beta1"


class KfpServer:
    """Listens while `serving` lasts. With a token, requests must bear it; with `under`, come by this path."""

    url: str

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        token: str = "",
        namespaces: frozenset[str] = frozenset(),
        under: str = "",
    ) -> None:
        self.state = State({**os.environ, **(environment or {})}, namespaces)
        self.token = token
        self.under = under
        self.requests: list[str] = []
        self.num_outages = 0
        """How many of the next requests fail, as behind a gateway without a server."""

    def tick(self, at: datetime) -> list[Execution]:
        """Let the schedule controller act as at this moment; the runs that it created."""
        return self.state.tick(at)

    def run(self, run_id: str) -> Execution:
        return self.state.runs[run_id]

    def _answer(
        self, method: str, target: str, query: Mapping[str, str], raw: bytes, headers: Mapping[str, str]
    ) -> Answer:
        path = target.removeprefix(self.under).removeprefix(PREFIX)
        self.requests.append(f"{method} {path}")
        if self.num_outages:
            self.num_outages -= 1
            return 503, {"error": "no healthy upstream"}
        try:
            if not target.startswith(self.under + PREFIX):
                raise missing("Page", target)
            if self.token and headers.get("Authorization") != f"Bearer {self.token}":
                raise ApiError(401, 16, "Unauthenticated: the request carries no valid bearer token")
            with self.state.lock:
                return 200, self._route(method, path, query, raw, headers)
        except ApiError as exc:
            return exc.status, exc.body
        except Exception as exc:  # a mistake of the double's: the client shall see it, and the server go on
            return 500, {"error": repr(exc), "code": 13, "message": repr(exc), "details": []}

    def _route(self, method: str, path: str, query: Mapping[str, str], raw: bytes, headers: Mapping[str, str]) -> Any:
        state = self.state
        match method, path.strip("/").replace(":", "/").split("/"):
            case "GET", ["healthz"]:
                return {"multi_user": bool(state.namespaces)}
            case "POST", ["pipelines", "upload"]:
                return state.upload(_uploaded(raw, headers), query)
            case "POST", ["pipelines", "upload_version"]:
                return state.upload_version(_uploaded(raw, headers), query)
            case "POST", ["pipelines"]:
                return state.create_pipeline(json.loads(raw))
            case "GET", ["pipelines"]:
                state.check_namespace(query.get("namespace", ""))
                return page("pipelines", state.pipelines.values(), query)
            case "GET", ["pipelines", pipeline_id, "versions"]:
                versions = [v for v in state.versions.values() if v["pipeline_id"] == pipeline_id]
                return page("pipeline_versions", versions, query)
            case "GET", ["pipelines", _, "versions", version_id]:
                return state.find(state.versions, "PipelineVersion", version_id)
            case "POST", ["experiments"]:
                return state.create_experiment(json.loads(raw))
            case "GET", ["experiments"]:
                state.check_namespace(query.get("namespace", ""))
                return page("experiments", state.experiments.values(), query)
            case "GET", ["experiments", experiment_id]:
                return state.find(state.experiments, "Experiment", experiment_id)
            case "POST", ["runs"]:
                return state.create_run(json.loads(raw)).shown()
            case "GET", ["runs"]:
                runs = [run.record for run in state.runs.values()]
                return page("runs", self._of_experiment(runs, query), query)
            case "GET", ["runs", run_id]:
                return state.find(state.runs, "Run", run_id).shown()
            case "POST", ["runs", run_id, "terminate"]:
                state.find(state.runs, "Run", run_id).terminate()
                return {}
            case "DELETE", ["runs", run_id]:
                del state.runs[state.find(state.runs, "Run", run_id).record["run_id"]]
                return {}
            case "POST", ["recurringruns"]:
                return state.create_schedule(json.loads(raw)).record
            case "GET", ["recurringruns"]:
                records = [schedule.record for schedule in state.schedules.values()]
                return page("recurringRuns", self._of_experiment(records, query), query)
            case "GET", ["recurringruns", schedule_id]:
                return state.find(state.schedules, "Job", schedule_id).record
            case "POST", ["recurringruns", schedule_id, "enable" | "disable" as verb]:
                state.find(state.schedules, "Job", schedule_id).set_enabled(verb == "enable")
                return {}
            case "DELETE", ["recurringruns", schedule_id]:
                state.delete_schedule(schedule_id, query.get("propagation_policy", ""))
                return {}
        raise missing("Page", path)

    def _of_experiment(self, records: list[dict[str, Any]], query: Mapping[str, str]) -> list[dict[str, Any]]:
        wanted = query.get("experiment_id")
        if not wanted:
            self.state.check_namespace(query.get("namespace", ""))
        return [record for record in records if not wanted or record["experiment_id"] == wanted]


@contextlib.contextmanager
def serving(environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[KfpServer]:
    """A server for the length of a block; `options` as for KfpServer."""
    server = KfpServer(environment, **options)
    try:
        with http_server.serving(lambda *request: server._answer(*request)) as server.url:
            yield server
    finally:
        server.state.close()


def _uploaded(raw: bytes, headers: Mapping[str, str]) -> str:
    """The file `uploadfile` of a multipart form."""
    kind = headers.get("Content-Type", "")
    form = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + raw)
    (part,) = (each for each in form.walk() if each.get_param("name", header="content-disposition") == "uploadfile")
    return part.get_payload(decode=True).decode()
