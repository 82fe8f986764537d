"""One run on Kubeflow, and the pipeline and config that it has."""

from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from components.shared.errors import UserError
from pipelines.kubeflow.client import Kubeflow
from pipelines.kubeflow.given_config import GivenConfig, sent

LIVE = ("PENDING", "RUNNING", "CANCELING", "PAUSED")
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
STOPPED = ("CANCELING", "CANCELED")
"""By a person."""


@dataclass(frozen=True)
class TaskRun:
    """One task of a run as the server reports it; one that was never started has no times."""

    name: str
    """The sentence that people see, or the key where it has none."""
    state: str
    began: datetime | None = None
    ended: datetime | None = None
    step: str = ""
    """Its key in the pipeline, which is the step's name in the store."""

    @property
    def seconds(self) -> float | None:
        """How long it took, once it is over."""
        return (self.ended - self.began).total_seconds() if self.began and self.ended else None

    def as_json(self) -> dict[str, Any]:
        """The task for scripts."""
        return {"state": self.state, "began": stamp(self.began), "ended": stamp(self.ended), "seconds": self.seconds}


@dataclass(frozen=True)
class Run:
    """One run; `detail` is kfp's own record of it."""

    kubeflow: Kubeflow
    detail: Any
    spec: dict[str, Any] = field(repr=False)

    @property
    def run_id(self) -> str:
        """Kubeflow's id."""
        return str(self.detail.run_id)

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.detail.display_name)

    @property
    def state(self) -> str:
        """As `state_of` has it."""
        return state_of(self.detail)

    @property
    def is_over(self) -> bool:
        """Nothing of it will change any more."""
        return self.state in OVER

    @property
    def succeeded(self) -> bool:
        """It did all that it should have."""
        return self.state in ("SUCCEEDED", "SKIPPED")

    @property
    def url(self) -> str:
        """Where people see it."""
        return self.kubeflow.run_url(self.run_id)

    @cached_property
    def config(self) -> GivenConfig:
        """The config that it runs with."""
        return GivenConfig.of(self.detail, self.spec)

    @property
    def is_ours(self) -> bool:
        """One of Fineloop's pipelines."""
        return bool(self.config.adapter) or self.spec.get("pipelineInfo", {}).get("name", "").startswith("fineloop-")

    @property
    def store_run_id(self) -> str:
        """The run's name in the store."""
        return sent(self.detail).get("run_id") or self.run_id

    def task_runs(self) -> list[TaskRun]:
        """Return the pipeline's tasks in the order in which they began, and at the end those that did not begin."""
        titles = task_titles(self.spec)
        keys = {title: key for key, title in titles.items()} | {key: key for key in titles}
        tasks = (self.detail.run_details.task_details or []) if self.detail.run_details else []
        begun = {
            key: _task_run(key, titles[key], task)
            for task in tasks
            if (key := keys.get(task.display_name)) and task.state  # one that was never reached has none
        }
        absent = "SKIPPED" if self.is_over else "PENDING"
        others = [TaskRun(title, absent, step=key) for key, title in titles.items() if key not in begun]
        return [
            *sorted(begun.values(), key=lambda task: (task.began is None, task.began)),
            *sorted(others, key=lambda task: task.name),
        ]

    def as_json(self) -> dict[str, Any]:
        """The run for scripts, without its steps."""
        return {
            "run_id": self.run_id,
            "run_name": self.name,
            "state": self.state,
            "url": self.url,
            "adapter": self.config.adapter,
            "created": stamp(self.detail.created_at),
            "finished": stamp(self.detail.finished_at if self.is_over else None),
            "recurring_run_id": self.detail.recurring_run_id or "",
        }


def state_of(detail: Any) -> str:
    """PENDING, RUNNING, SUCCEEDED, SKIPPED, FAILED, CANCELING, CANCELED or PAUSED.

    Kubeflow lets a run that was stopped end as FAILED; only its history says that it was being canceled.
    """
    state: str = detail.state or "PENDING"  # before its first report
    history = [entry.state for entry in detail.state_history or []]
    return "CANCELED" if state == "FAILED" and "CANCELING" in history else state


def task_titles(spec: dict[str, Any]) -> dict[str, str]:
    """What people call each task that runs a container, by its key; branches are none."""
    components = spec.get("components", {})
    dags = [spec["root"]["dag"], *(c["dag"] for c in components.values() if "dag" in c)] if spec else []
    return {
        key: task["taskInfo"]["name"]
        for dag in dags
        for key, task in dag["tasks"].items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    }


def stamp(moment: datetime | None) -> str | None:
    """A time for scripts, in UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None


class Specs:
    """The pipeline of each run; a version is requested once."""

    def __init__(self, kubeflow: Kubeflow) -> None:
        self._kubeflow = kubeflow
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, detail: Any) -> dict[str, Any]:
        """The run's spec; empty where its version was deleted."""
        if detail.pipeline_spec:
            return _bare(detail.pipeline_spec)
        reference = detail.pipeline_version_reference
        if not reference or not reference.pipeline_version_id:
            return {}
        version_id = reference.pipeline_version_id
        if version_id not in self._known:
            try:
                with self._kubeflow.asking("show the pipeline of a run"):
                    version = self._kubeflow.client.get_pipeline_version(reference.pipeline_id, version_id)
                self._known[version_id] = _bare(version.pipeline_spec)
            except UserError:
                self._known[version_id] = {}
        return self._known[version_id]


def _bare(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document.get("pipeline_spec", document)
    return spec if "root" in spec else {}


def _task_run(key: str, title: str, task: Any) -> TaskRun:
    # Argo gives a node that is not over the zero of Go's time.
    ended = task.end_time if task.end_time and task.end_time.year > 1970 else None
    return TaskRun(title, task.state, task.start_time or task.create_time, ended, step=key)
