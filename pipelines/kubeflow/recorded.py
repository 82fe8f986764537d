"""Records of a run's steps in the store. Kubeflow itself reports neither why a step failed nor its progress."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from components.config.schema import RegistryConfig
from components.promote.announce import failed_notifications, warning
from components.records import runs
from components.records.steps import ROLES, Decision, Evaluation, Role, StepRecord
from components.shared.durations import estimated_duration
from components.shared.errors import ConfigError, FineloopError
from components.store.store import Store
from pipelines.kubeflow.run import Run
from pipelines.kubeflow.run_jobs import INSTALLED_IN

LOGS = "kubectl -n {namespace} logs -l pipeline/runid={run_id} -c main --tail 50"
"""Command that prints the logs of a run's steps. Kubeflow sets the label `pipeline/runid` on a run's pods (2.17,
apiserver/template/v2_template.go), and deletes them an hour after the run has ended."""

T = TypeVar("T")


class Recorded:
    """The records of one run. If the store cannot be read from here, `refused` says why, and all else is empty."""

    def __init__(self, run: Run) -> None:
        self.refused = ""
        self._run_id = run.store_run_id
        self._config = run.config.table
        self._store: Store | None = None

    def errors(self) -> dict[str, str]:
        """Return the error message of each failed step; a step that was killed before it recorded one is missing."""
        nothing: list[StepRecord] = []
        failed = [step for step in self._read(runs.steps, nothing) if not step.succeeded]
        return {step.step: step.result["error"]["message"] for step in failed if "error" in step.result}

    def failed_notifications(self) -> dict[str, str]:
        """Return the notifications of the promotion that failed, and why."""
        nothing: list[StepRecord] = []
        return failed_notifications(self._read(runs.steps, nothing))

    def progress(self) -> str:
        """Describe the training's progress; empty before its first steps are recorded."""
        found = self._read(lambda store, run_id: store.read(runs.run_key(run_id, runs.METRICS)), None)
        lines = found[0].splitlines() if found else []
        steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        if not steps:
            return ""
        step, total, elapsed_s = (steps[-1][key] for key in ("step", "num_steps", "elapsed_s"))
        at = f"step {step} of {total}, loss {steps[-1]['loss']:.3f}"
        left_s = math.ceil(elapsed_s / step * (total - step))
        return f"{at}, about {estimated_duration(left_s)} left" if left_s else at

    def decision(self) -> Decision | None:
        """Return the gate's decision; None before there is one."""
        return self._read(lambda store, run_id: runs.find(store, run_id, Decision, to_show=True), None)

    def metrics(self) -> dict[Role, dict[str, float | None] | None]:
        """Return the compared models' metrics by role, None for a role without one; empty before the comparison."""
        found = self._read(lambda store, run_id: runs.find(store, run_id, Evaluation), None)
        return {role: model.metrics if (model := found.model(role)) else None for role in ROLES} if found else {}

    def _read(self, read: Callable[[Store, str], T], nothing: T) -> T:
        if self.refused:
            return nothing
        try:
            self._store = self._store or Store.open(_registry(self._config))
            return read(self._store, self._run_id)
        except FineloopError as exc:
            self.refused = str(exc)
            return nothing


def failures(run: Run, recorded: Recorded) -> list[str]:
    """Say why each failed step failed, for people, and where the logs are for steps that recorded no error."""
    failed = [task for task in run.task_runs() if task.state == "FAILED"] if run.state == "FAILED" else []
    errors = recorded.errors() if failed else {}
    silent = ", ".join(task.name for task in failed if task.step not in errors)
    logs = LOGS.format(namespace=run.kubeflow.namespace or INSTALLED_IN, run_id=run.run_id)
    where = [f"[{silent}] see the log, for an hour: {logs}"] if silent else []
    return [*(f"[{task.name}] {errors[task.step]}" for task in failed if task.step in errors), *where]


def as_json(run: Run, recorded: Recorded) -> dict[str, Any]:
    """Return a run's result for scripts; fields are empty if they are not known yet, or the store cannot be read."""
    decision = recorded.decision()
    return {
        "message": "; ".join(failures(run, recorded)),
        "decision": decision.decision if decision else None,
        "version": decision.version if decision else None,
        "reasons": list(decision.reasons) if decision else [],
        "metrics": recorded.metrics(),
    }


def outcome_lines(run: Run, recorded: Recorded) -> list[str]:
    """Describe a run's result for people: the decision, why it failed, or its progress."""
    if not run.is_over:
        return [progress] if (progress := recorded.progress()) else []
    decision = recorded.decision()
    lines = [*(_decision_lines(decision) if decision else []), *failures(run, recorded)]
    if decision and decision.promoted:
        lines += [
            warning(key, decision.adapter, decision.alias, why) for key, why in recorded.failed_notifications().items()
        ]
    refused = f"what it recorded cannot be read from here: {recorded.refused}" if recorded.refused else ""
    return [*lines, *([refused] if refused else [])]


def _decision_lines(decision: Decision) -> list[str]:
    alias = f"{decision.adapter}@{decision.alias}"
    headline = {
        "promote": f"promoted: {alias} is now {decision.version}",
        "hold": f"held: {decision.version} is published, and {alias} stays where it was",
        "skipped": f"skipped: nothing was trained, and {alias} stays where it was",
    }[decision.decision]
    if decision.waits:
        headline = f"{decision.version} waits for a person's approval, and {alias} stays where it is until then"
    return [headline, *(f"  {reason}" for reason in decision.reasons)]


def _registry(config: Mapping[str, Any]) -> RegistryConfig:
    """Read only the registry section of a config: the run may be from an older or newer release."""
    try:
        return RegistryConfig.model_validate(config.get("registry", {}))
    except ValidationError as exc:
        raise ConfigError(f"the run's config names no registry: {exc}") from exc
