"""Runs on Kubeflow: how they are listed, started, followed and stopped, and what came of them."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import Any, TypeVar

import kfp_server_api
from pydantic import ValidationError

from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RegistryConfig
from components.handover.announce import failed_notifications, warning
from components.ray_cluster.submit import stop_run
from components.records import runs as records
from components.records.steps import ROLES, Decision, Evaluation, StepRecord
from components.shared.errors import FineloopError, KubeflowAway, KubeflowError, UserError
from components.shared.protocol import duration, estimated_duration
from components.store.store import Store
from pipelines.kubeflow.client import Kubeflow, one_of
from pipelines.kubeflow.compile import GivenConfig, Package, publish, sent

LIVE = ("PENDING", "RUNNING", "CANCELING", "PAUSED")
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
STOPPED = ("CANCELING", "CANCELED")
"""By a person."""
NUM_SEARCHED = 1000
STOP_S = 180.0
POLL_S = (0.5, 10.0)
"""Shortest and longest pause between requests, in seconds: short after a change, and growing while nothing changes."""
PROGRESS_S = 30.0
"""Seconds between reads of the training's progress."""
OUTAGE_S = 300.0
"""Seconds that the server may be unavailable before `follow` gives up; the run itself continues."""
INSTALLED_IN = "fineloop"
"""The namespace of infra/README.md."""
T = TypeVar("T")


@dataclass(frozen=True)
class TaskRun:
    """One task of a run as the server reports it; one that was never started has no times."""

    name: str
    """The sentence that people see, or the key where it has none."""
    state: str
    step: str
    """Its key in the pipeline, which is the step's name in the store."""
    began: datetime | None = None
    ended: datetime | None = None

    @property
    def seconds(self) -> float | None:
        return (self.ended - self.began).total_seconds() if self.began and self.ended else None

    def as_json(self) -> dict[str, Any]:
        return {"state": self.state, "began": stamp(self.began), "ended": stamp(self.ended), "seconds": self.seconds}


class Run:
    """One run: kfp's own record of it as `detail`, its pipeline as `spec`, and what is read out of both."""

    def __init__(self, kubeflow: Kubeflow, detail: Any, spec: dict[str, Any]) -> None:
        self.kubeflow, self.detail, self.spec = kubeflow, detail, spec
        self.run_id, self.name, self.state = str(detail.run_id), str(detail.display_name), state_of(detail)
        self.is_over, self.succeeded = self.state in OVER, self.state in ("SUCCEEDED", "SKIPPED")
        self.url = f"{kubeflow.ui}/#/runs/details/{self.run_id}"
        self.config = GivenConfig.of(detail, spec)
        self.store_run_id = sent(detail).get("run_id") or self.run_id

    def task_runs(self) -> list[TaskRun]:
        """Return the pipeline's tasks in the order in which they began, and at the end those that did not begin."""
        titles = task_titles(self.spec)
        keys = {title: key for key, title in titles.items()} | {key: key for key in titles}
        begun: dict[str, TaskRun] = {}
        for task in (self.detail.run_details and self.detail.run_details.task_details) or []:
            key = keys.get(task.display_name)
            if key and task.state:  # one that was never reached has none
                # Argo gives a node that is not over the zero of Go's time.
                ended = task.end_time if task.end_time and task.end_time.year > 1970 else None
                begun[key] = TaskRun(titles[key], task.state, key, task.start_time or task.create_time, ended)
        absent = "SKIPPED" if self.is_over else "PENDING"
        others = [TaskRun(title, absent, key) for key, title in titles.items() if key not in begun]
        return [
            *sorted(begun.values(), key=lambda task: (task.began is None, task.began)),
            *sorted(others, key=lambda task: task.name),
        ]

    def as_json(self) -> dict[str, Any]:
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


def specs(kubeflow: Kubeflow) -> Callable[[Any], dict[str, Any]]:
    """Return a function that gives a run's pipeline, empty where its version was deleted; requested once each."""

    @cache
    def of_version(pipeline_id: str, version_id: str) -> Any:
        try:
            with kubeflow.asking("show the pipeline of a run"):
                return kubeflow.client.get_pipeline_version(pipeline_id, version_id).pipeline_spec
        except UserError:
            return {}

    def of(detail: Any) -> dict[str, Any]:
        reference = detail.pipeline_version_reference
        document = detail.pipeline_spec
        if not document and reference and reference.pipeline_version_id:
            document = of_version(reference.pipeline_id, reference.pipeline_version_id)
        spec: dict[str, Any] = (document or {}).get("pipeline_spec", document)
        return spec if spec and "root" in spec else {}

    return of


def get(kubeflow: Kubeflow, run_id: str) -> Run:
    """Fetch the run with this id, including its steps."""
    with kubeflow.asking(f"show run {run_id}"):
        detail = kubeflow.client.get_run(run_id)
    return Run(kubeflow, detail, specs(kubeflow)(detail))


def find(kubeflow: Kubeflow, reference: str) -> Run:
    """Find a run by its id, the first digits of its id, or its name; of several with the same name, the newest. Raises
    UserError: there is none, or the digits match several."""
    newest = list(itertools.islice(_details(kubeflow), NUM_SEARCHED))
    matches = [detail for detail in newest if reference in (detail.run_id, detail.display_name)][:1]
    matches = matches or [detail for detail in newest if detail.run_id.startswith(reference)]
    if len(matches) > 1:
        raise UserError(f"run {reference!r} fits {len(matches)} runs: give more digits of its id")
    if not matches and len(newest) < NUM_SEARCHED:
        raise UserError(f"{kubeflow.host} has no run {reference!r}: see `fineloop runs list`")
    return get(kubeflow, matches[0].run_id if matches else reference)


def listed(
    kubeflow: Kubeflow, *, experiment: str = "", state: str = "", adapter: str = "", limit: int = 20
) -> list[Run]:
    """Return the newest runs of ours that match, at most `limit`. Raises UserError: there is no such experiment."""
    filters: dict[str, Any] = {}
    if experiment:
        namespace = kubeflow.namespace or None
        filters["experiment_id"] = kubeflow.id_of(
            "experiment", experiment, kubeflow.client.list_experiments, namespace=namespace
        )
        if not filters["experiment_id"]:
            raise UserError(f"--experiment {experiment}: {kubeflow.host} has no such experiment")
    if state := state.upper():
        filters["filter"] = one_of("state", state, *(["FAILED"] if state == "CANCELED" else []))  # see `state_of`
    spec_of = specs(kubeflow)
    matches: list[Run] = []
    for detail in _details(kubeflow, **filters):
        run = Run(kubeflow, detail, spec_of(detail))
        is_ours = run.config.adapter or run.spec.get("pipelineInfo", {}).get("name", "").startswith("fineloop-")
        if is_ours and adapter in ("", run.config.adapter) and state in ("", run.state):
            matches.append(run)
        if len(matches) == limit:
            break
    return matches


def of_schedule(kubeflow: Kubeflow, recurring_run_ids: Sequence[str]) -> list[str]:
    """Return the ids of the live runs that these recurring runs have started."""
    live = _details(kubeflow, filter=one_of("state", *LIVE))
    return [detail.run_id for detail in live if detail.recurring_run_id in recurring_run_ids]


def _details(kubeflow: Kubeflow, **filters: Any) -> Iterator[Any]:
    """kfp's records of runs, newest first."""
    namespace = {} if "experiment_id" in filters else {"namespace": kubeflow.namespace or None}
    return kubeflow.listed("runs", kubeflow.client.list_runs, sort_by="created_at desc", **namespace, **filters)


def start(
    kubeflow: Kubeflow,
    package: Package,
    *,
    parameters: dict[str, Any],
    experiment: str,
    run_name: str,
    service_account: str = "",
) -> Run:
    """Upload the pipeline if it is new, and start a run of it."""
    version = publish(kubeflow, package)
    with kubeflow.asking("start a run"):
        made = kubeflow.client.create_experiment(experiment, namespace=kubeflow.namespace or None)
        detail = kubeflow.client.run_pipeline(
            made.experiment_id, run_name, params=parameters, service_account=service_account or None, **version
        )
    return Run(kubeflow, detail, package.spec)


def follow(
    run: Run,
    say: Callable[[str], None],
    *,
    progress: Callable[[], str] = lambda: "",
    at_most_s: float = math.inf,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Wait until the run is over, whatever its result; `say` each change of a task and, in between, the `progress`.

    kfp's own wait does not treat a canceled run as over. Raises KubeflowAway: the server was unavailable for five
    minutes; KubeflowError: the run is not over after `at_most_s` seconds.
    """
    reported: dict[str, str] = {}
    pause = 0.0
    began = answered = looked = clock()

    def say_once(key: str, value: str, line: str) -> None:
        nonlocal pause
        if value and reported.get(key) != value:
            reported[key], pause = value, 0.0
            say(line)

    while True:
        try:
            run = get(run.kubeflow, run.run_id)
            answered = clock()
        except KubeflowAway as exc:
            if clock() - answered > OUTAGE_S:
                exc.add_note(f"run {run.run_id} goes on without being watched: fineloop runs show {run.run_id}")
                raise
            say_once("run", "away", f"{exc}; asking again")
        else:
            if not run.is_over:
                say_once("run", run.state, f"{run.name} is {run.state.lower()}")
            for task in run.task_runs():
                how = "started" if task.state == "RUNNING" else task.state.lower()
                after = "" if task.seconds is None else f" after {duration(task.seconds)}"
                if task.began:
                    say_once(task.name, task.state, f"[{task.name}] {how}{after}")
            if run.is_over:
                return run
            if clock() - looked >= PROGRESS_S:
                looked, line = clock(), progress()
                say_once("progress", line, line)
        if clock() - began > at_most_s:
            raise KubeflowError(
                f"run {run.run_id} is still {run.state} after {at_most_s:.0f} s: see {run.url}, "
                "and `kubectl get workflows` in its namespace"
            )
        pause = min(max(POLL_S[0], pause * 1.5), POLL_S[1])
        sleep(pause)


def stop(run: Run, namespace: str = "", *, timeout_s: float = STOP_S) -> tuple[Run, list[str], list[str]]:
    """Terminate a run and its Ray jobs, and wait until it is over; a run that is over stays as it is.

    A run that is already being stopped is awaited. Its jobs are stopped when it is being stopped, and again when it is
    over, because a step may have started one in between. A cluster that cannot be reached from here is no error.
    Returns the run as it is then, the ids of the stopped jobs, and lines about these for people.
    """
    section = run.config.table.get("ray", {})
    cluster = section.get("cluster", {}) if isinstance(section, Mapping) else {}
    ray = RayConfig()
    if cluster.get("kind") == "rayjob":
        place = cluster.get("namespace") or namespace or INSTALLED_IN
        ray = RayConfig(cluster=RayJobCluster(kind="rayjob", namespace=place))
    jobs: dict[str, None] = {}

    def stop_jobs() -> list[str]:
        try:
            jobs.update(dict.fromkeys(stop_run(run.store_run_id, ray)))
        except FineloopError as exc:
            return [f"its Ray jobs are left to its steps and to the cluster's `fineloop reap`: {exc}"]
        return []

    stopped = run
    if not run.is_over:
        with run.kubeflow.asking(f"stop run {run.run_id}"):
            try:
                run.kubeflow.client.terminate_run(run.run_id)
            except kfp_server_api.ApiException as exc:
                # The server answers 400 for a run that is being terminated, or that has just ended.
                if exc.status != 400 or get(run.kubeflow, run.run_id).state in ("PENDING", "RUNNING", "PAUSED"):
                    raise
        stop_jobs()
        stopped = follow(run, lambda _: None, at_most_s=timeout_s)
    refusal = stop_jobs()
    return stopped, [*jobs], [*(f"stopped {job_id}" for job_id in jobs), *refusal]


class Recorded:
    """What a run's steps recorded in the store: Kubeflow reports neither why a step failed nor its progress.

    Each record is read once it is there. If the store cannot be read from here, `refused` says why, and all is empty.
    """

    def __init__(self, run: Run) -> None:
        self.refused = ""
        self._run_id, self._registry = run.store_run_id, run.config.table.get("registry", {})

    def progress(self) -> str:
        """Describe the training's progress; empty before its first steps are recorded."""
        metrics = self._read(lambda store: store.read(records.run_key(self._run_id, records.METRICS)))
        lines = metrics[0].splitlines() if metrics else []
        steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        if not steps:
            return ""
        step, total, elapsed_s = (steps[-1][key] for key in ("step", "num_steps", "elapsed_s"))
        at = f"step {step} of {total}, loss {steps[-1]['loss']:.3f}"
        left_s = math.ceil(elapsed_s / step * (total - step))
        return f"{at}, about {estimated_duration(left_s)} left" if left_s else at

    def steps(self) -> list[StepRecord]:
        return self._read(lambda store: records.steps(store, self._run_id)) or []

    def decision(self) -> Decision | None:
        return self._read(lambda store: records.find(store, self._run_id, Decision, to_show=True))

    def evaluation(self) -> Evaluation | None:
        return self._read(lambda store: records.find(store, self._run_id, Evaluation))

    @cached_property
    def _store(self) -> Store:
        """The run's; only this section of its config is read, as the run may be of an older or newer release."""
        return Store.open(RegistryConfig.model_validate(self._registry))

    def _read(self, read: Callable[[Store], T]) -> T | None:
        if not self.refused:
            try:
                return read(self._store)
            except (FineloopError, ValidationError) as exc:
                self.refused = str(exc)
        return None


def failures(run: Run, recorded: Recorded) -> list[str]:
    """Say why each failed step failed, for people, and where the logs are for steps that recorded no error."""
    failed = [task for task in run.task_runs() if task.state == "FAILED"] if run.state == "FAILED" else []
    steps = recorded.steps() if failed else []
    errors = {step.step: step.result["error"]["message"] for step in steps if "error" in step.result}
    lines = [f"[{task.name}] {errors[task.step]}" for task in failed if task.step in errors]
    if silent := ", ".join(task.name for task in failed if task.step not in errors):
        # Kubeflow labels a run's pods so (2.17, apiserver/template/v2_template.go), and deletes them after an hour.
        pods = f"-n {run.kubeflow.namespace or INSTALLED_IN} logs -l pipeline/runid={run.run_id} -c main"
        lines.append(f"[{silent}] see the log, for an hour: kubectl {pods} --tail 50")
    return lines


def as_json(run: Run, recorded: Recorded) -> dict[str, Any]:
    """Return a run's result for scripts; fields are empty if they are not known yet, or the store cannot be read."""
    decision, evaluation = recorded.decision(), recorded.evaluation()
    models = {role: evaluation.model(role) for role in ROLES} if evaluation else {}
    return {
        "message": "; ".join(failures(run, recorded)),
        "decision": decision.decision if decision else None,
        "version": decision.version if decision else None,
        "reasons": list(decision.reasons) if decision else [],
        "metrics": {role: model and model.metrics for role, model in models.items()},
    }


def outcome_lines(run: Run, recorded: Recorded) -> list[str]:
    """Describe a run's result for people: the decision, why it failed, or its progress."""
    if not run.is_over:
        return [progress] if (progress := recorded.progress()) else []
    lines = []
    if decision := recorded.decision():
        alias = f"{decision.adapter}@{decision.alias}"
        headline = {
            "promote": f"promoted: {alias} is now {decision.version}",
            "hold": f"held: {decision.version} is published, and {alias} stays where it was",
            "skipped": f"skipped: nothing was trained, and {alias} stays where it was",
        }[decision.decision]
        if decision.waits:
            headline = f"{decision.version} waits for a person's approval, and {alias} stays where it is until then"
        lines = [headline, *(f"  {reason}" for reason in decision.reasons)]
    lines += failures(run, recorded)
    if decision and decision.promoted:
        failed = failed_notifications(recorded.steps())
        lines += [warning(key, why, alias) for key, why in failed.items()]
    if recorded.refused:
        lines.append(f"what it recorded cannot be read from here: {recorded.refused}")
    return lines
