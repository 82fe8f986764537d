"""What the server holds: experiments, pipelines with their versions, runs and recurring runs."""

import tempfile
import threading
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.doubles.kfp_server.cron import Cron
from tests.doubles.kfp_server.errors import ApiError, exists, invalid, missing
from tests.doubles.kfp_server.execution import Execution, now
from tests.doubles.kfp_server.schedules import Schedule
from tests.doubles.kfp_server.specs import Pipeline, check_fields, check_parameters, parse_package, parse_pipeline


class State:
    """`namespaces` turns multi-user mode on: the ones that the caller may use."""

    def __init__(self, environment: Mapping[str, str], namespaces: frozenset[str] = frozenset()) -> None:
        self.environment = environment
        self.namespaces = namespaces
        self.lock = threading.RLock()
        self.folder = tempfile.TemporaryDirectory(prefix="kfp-server-")
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Execution] = {}
        self.schedules: dict[str, Schedule] = {}

    def check_namespace(self, namespace: str) -> None:
        """Single-user mode has one namespace, whatever the request says."""
        if not self.namespaces:
            return
        if not namespace:
            raise invalid("Resource cannot have an empty namespace and experiment id in multi-user mode")
        if namespace not in self.namespaces:
            raise ApiError(403, 7, f"User is not authorized with reason: no access to namespace {namespace}")

    def create_experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        check_fields("V2beta1Experiment", body)
        self.check_namespace(body.get("namespace", ""))
        name = body.get("display_name", "")
        if not name:
            raise invalid("Experiment name is empty")
        if any(other["display_name"] == name for other in self.experiments.values()):
            raise exists(f"The name {name} already exist. Please specify a new name")
        made = {**body, "experiment_id": str(uuid.uuid4()), "created_at": now(), "storage_state": "AVAILABLE"}
        self.experiments[made["experiment_id"]] = made
        return made

    def create_pipeline(self, body: dict[str, Any]) -> dict[str, Any]:
        """A pipeline without a version."""
        check_fields("V2beta1Pipeline", body)
        self.check_namespace(body.get("namespace", ""))
        return self._add_pipeline(body.get("display_name") or body.get("name", ""), body)

    def upload(self, text: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A new pipeline with its first version."""
        pipeline = parse_package(text)
        self.check_namespace(query.get("namespace", ""))
        made = self._add_pipeline(query.get("name") or pipeline.name, query)
        self._add_version(made["pipeline_id"], made["display_name"], pipeline, query)
        return made

    def upload_version(self, text: str, query: Mapping[str, str]) -> dict[str, Any]:
        pipeline = parse_package(text)
        parent = self.find(self.pipelines, "Pipeline", query.get("pipelineid", ""))["pipeline_id"]
        name = query.get("name") or pipeline.name
        if any(v["pipeline_id"] == parent and v["display_name"] == name for v in self.versions.values()):
            raise exists(f"Failed to create a new pipeline version. The name {name} already exist")
        return self._add_version(parent, name, pipeline, query)

    def create_run(self, body: dict[str, Any], schedule: Schedule | None = None) -> Execution:
        check_fields("V2beta1Run", body)
        pipeline, config = self._checked(body)
        run_id = str(uuid.uuid4())
        record = {**body, "run_id": run_id, "runtime_config": config, "created_at": now(), "scheduled_at": now()}
        record |= {"recurring_run_id": schedule.record["recurring_run_id"]} if schedule else {}
        record |= {"storage_state": "AVAILABLE"}
        self.runs[run_id] = Execution(record, pipeline, Path(self.folder.name) / run_id, self.environment)
        return self.runs[run_id]

    def create_schedule(self, body: dict[str, Any]) -> Schedule:
        check_fields("V2beta1RecurringRun", body)
        _, config = self._checked(body)
        concurrency = int(body.get("max_concurrency") or 0)
        if not 1 <= concurrency <= 10:
            outside = f"out of range. Support 1-10. Received {concurrency}."
            raise invalid(f"The max concurrency of the recurring run is {outside}")
        trigger = (body.get("trigger") or {}).get("cron_schedule") or {}
        schedule_id, status = str(uuid.uuid4()), "ENABLED" if body.get("mode") == "ENABLE" else "DISABLED"
        record = {**body, "recurring_run_id": schedule_id, "runtime_config": config, "status": status}
        record |= {"max_concurrency": str(concurrency), "created_at": now(), "updated_at": now()}
        self.schedules[schedule_id] = Schedule(record, Cron(trigger.get("cron", "")))
        return self.schedules[schedule_id]

    def delete_schedule(self, schedule_id: str, policy: str) -> None:
        """Its workflows belong to it: unless they are orphaned, they are deleted with it."""
        if policy not in ("", "ORPHAN"):
            raise invalid(f"unknown propagation policy {policy}")
        self.find(self.schedules, "Job", schedule_id)
        del self.schedules[schedule_id]
        if policy != "ORPHAN":
            for run in self.live_runs(schedule_id):
                run.kill()

    def live_runs(self, schedule_id: str) -> list[Execution]:
        mine = [run for run in self.runs.values() if run.record.get("recurring_run_id") == schedule_id]
        return [run for run in mine if not run.is_over]

    def tick(self, at: datetime) -> list[Execution]:
        """What the schedule controller does at a moment: each schedule that is due and may creates one run."""
        made = []
        with self.lock:
            for schedule in list(self.schedules.values()):
                body = schedule.due(at, num_live=len(self.live_runs(schedule.record["recurring_run_id"])))
                if body is not None:
                    made.append(self.create_run(body, schedule))
        return made

    def close(self) -> None:
        for run in self.runs.values():
            run.kill()
        self.folder.cleanup()

    @staticmethod
    def find(table: Mapping[str, Any], what: str, key: str) -> Any:
        if key not in table:
            raise missing(what, key)
        return table[key]

    def _checked(self, body: Mapping[str, Any]) -> tuple[Pipeline, dict[str, Any]]:
        if not body.get("display_name"):
            raise invalid("The run name is empty. Please specify a valid name")
        experiment = self.find(self.experiments, "Experiment", body.get("experiment_id") or "")
        if self.namespaces:
            self.check_namespace(experiment.get("namespace", ""))
        if reference := body.get("pipeline_version_reference"):
            version = self.find(self.versions, "PipelineVersion", reference.get("pipeline_version_id", ""))
            pipeline = parse_pipeline(version["pipeline_spec"])
        elif body.get("pipeline_spec"):
            pipeline = parse_pipeline(body["pipeline_spec"])
        else:
            raise invalid("Pipeline source is empty: neither a pipeline spec nor a pipeline version")
        config = dict(body.get("runtime_config") or {})
        check_parameters(pipeline, config.get("parameters") or {})
        return pipeline, config

    def _add_pipeline(self, name: str, described: Mapping[str, str]) -> dict[str, Any]:
        if not name:
            raise invalid("pipeline's name cannot be empty")
        if any(other["display_name"] == name for other in self.pipelines.values()):
            raise exists(f"Failed to create a new pipeline. The name {name} already exist. Please specify a new name")
        made = {"pipeline_id": str(uuid.uuid4()), **_named(name, described)}
        self.pipelines[made["pipeline_id"]] = made
        return made

    def _add_version(self, pipeline_id: str, name: str, pipeline: Pipeline, query: Mapping[str, str]) -> dict[str, Any]:
        made = {"pipeline_id": pipeline_id, "pipeline_version_id": str(uuid.uuid4()), **_named(name, query)}
        made["pipeline_spec"] = pipeline.document
        self.versions[made["pipeline_version_id"]] = made
        return made


def _named(name: str, query: Mapping[str, str]) -> dict[str, Any]:
    return {"display_name": name, "name": name, "description": query.get("description", ""), "created_at": now()}
