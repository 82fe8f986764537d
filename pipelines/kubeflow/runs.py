"""Runs on Kubeflow: how they are listed, started, followed and stopped, and what came of them."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

import kfp_server_api
from pydantic import ValidationError

from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RegistryConfig
from components.promote.announce import failed_notifications, warning
from components.ray_cluster.submit import stop_run
from components.records import runs as records
from components.records.steps import ROLES, Decision, Evaluation, Role, StepRecord
from components.shared.errors import ConfigError, FineloopError, KubeflowAway, KubeflowError, UserError
from components.shared.protocol import duration, estimated_duration
from components.store.store import Store
from pipelines.kubeflow.client import Kubeflow, one_of
from pipelines.kubeflow.compile import GivenConfig, Package, publish, sent

LIVE = ("PENDING", "RUNNING", "CANCELING", "PAUSED")
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
STOPPED = ("CANCELING", "CANCELED")
"""By a person."""
NEWEST_FIRST = "created_at desc"
NUM_SEARCHED = 1000
STOP_S = 180.0
SERVER_STATES = {"CANCELED": ["CANCELED", "FAILED"]}
"""The server's states for a state of `Run.state`, if they differ."""
POLL_S = (0.5, 10.0)
"""Shortest and longest pause between requests, in seconds: short after a change, and growing while nothing changes."""
PROGRESS_S = 30.0
"""Seconds between reads of the training's progress."""
OUTAGE_S = 300.0
"""Seconds that the server may be unavailable before `follow` gives up; the run itself continues."""
Say = Callable[[str], None]
INSTALLED_IN = "fineloop"
"""The namespace of infra/README.md."""
LOGS = "kubectl -n {namespace} logs -l pipeline/runid={run_id} -c main --tail 50"
"""Command that prints the logs of a run's steps. Kubeflow sets the label `pipeline/runid` on a run's pods (2.17,
apiserver/template/v2_template.go), and deletes them an hour after the run has ended."""
T = TypeVar("T")


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
        return (self.ended - self.began).total_seconds() if self.began and self.ended else None

    def as_json(self) -> dict[str, Any]:
        return {"state": self.state, "began": stamp(self.began), "ended": stamp(self.ended), "seconds": self.seconds}


@dataclass(frozen=True)
class Run:
    """One run; `detail` is kfp's own record of it."""

    kubeflow: Kubeflow
    detail: Any
    spec: dict[str, Any] = field(repr=False)

    @property
    def run_id(self) -> str:
        return str(self.detail.run_id)

    @property
    def name(self) -> str:
        return str(self.detail.display_name)

    @property
    def state(self) -> str:
        return state_of(self.detail)

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def succeeded(self) -> bool:
        return self.state in ("SUCCEEDED", "SKIPPED")

    @property
    def url(self) -> str:
        return self.kubeflow.run_url(self.run_id)

    @cached_property
    def config(self) -> GivenConfig:
        return GivenConfig.of(self.detail, self.spec)

    @property
    def is_ours(self) -> bool:
        return bool(self.config.adapter) or self.spec.get("pipelineInfo", {}).get("name", "").startswith("fineloop-")

    @property
    def store_run_id(self) -> str:
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


def get(kubeflow: Kubeflow, run_id: str) -> Run:
    """Fetch the run with this id, including its steps."""
    with kubeflow.asking(f"show run {run_id}"):
        detail = kubeflow.client.get_run(run_id)
    return Run(kubeflow, detail, Specs(kubeflow).of(detail))


def find(kubeflow: Kubeflow, reference: str) -> Run:
    """Find a run by its id, the first digits of its id, or its name; of several with the same name, the newest.

    Raises:
        UserError: there is none, or the digits match several.
    """
    seen = list(itertools.islice(_details(kubeflow), NUM_SEARCHED))
    named = [detail for detail in seen if reference in (detail.run_id, detail.display_name)][:1]
    found = named or [detail for detail in seen if detail.run_id.startswith(reference)]
    if len(found) > 1:
        raise UserError(f"run {reference!r} fits {len(found)} runs: give more digits of its id")
    if not found and len(seen) < NUM_SEARCHED:
        raise UserError(f"{kubeflow.host} has no run {reference!r}: see `fineloop runs list`")
    return get(kubeflow, found[0].run_id if found else reference)


def listed(
    kubeflow: Kubeflow, *, experiment: str = "", state: str = "", adapter: str = "", limit: int = 20
) -> list[Run]:
    """Return the newest runs that match, at most `limit`.

    Raises:
        UserError: there is no such experiment.
    """
    chosen: dict[str, Any] = {}
    if experiment:
        experiments, of_mine = kubeflow.client.list_experiments, {"namespace": kubeflow.namespace or None}
        experiment_id = kubeflow.id_of("experiments", experiment, experiments, "experiment_id", **of_mine)
        if not experiment_id:
            raise UserError(f"--experiment {experiment}: {kubeflow.host} has no such experiment")
        chosen["experiment_id"] = experiment_id
    wanted = state.upper()
    if wanted:
        chosen["filter"] = one_of("state", *SERVER_STATES.get(wanted, [wanted]))
    specs = Specs(kubeflow)
    runs = (Run(kubeflow, detail, specs.of(detail)) for detail in _details(kubeflow, **chosen))
    fits = (run for run in runs if run.is_ours and adapter in ("", run.config.adapter) and wanted in ("", run.state))
    return list(itertools.islice(fits, limit))


def of_schedule(kubeflow: Kubeflow, recurring_run_ids: Sequence[str]) -> list[Any]:
    """Return kfp's records of the live runs that these recurring runs have started."""
    live = _details(kubeflow, filter=one_of("state", *LIVE))
    return [detail for detail in live if detail.recurring_run_id in recurring_run_ids]


def _details(kubeflow: Kubeflow, **chosen: Any) -> Iterator[Any]:
    namespace = {} if "experiment_id" in chosen else {"namespace": kubeflow.namespace or None}
    return kubeflow.listed("runs", kubeflow.client.list_runs, "runs", sort_by=NEWEST_FIRST, **namespace, **chosen)


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
    published = publish(kubeflow, package)
    with kubeflow.asking("start a run"):
        made = kubeflow.client.create_experiment(experiment, namespace=kubeflow.namespace or None)
        detail = kubeflow.client.run_pipeline(
            made.experiment_id,
            run_name,
            params=parameters,
            pipeline_id=published.pipeline_id,
            version_id=published.version_id,
            service_account=service_account or None,
        )
    return Run(kubeflow, detail, package.spec)


def follow(
    run: Run,
    say: Say,
    *,
    progress: Callable[[], str] = lambda: "",
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Wait until the run is over, whatever its result; `say` each change of a task and, in between, the `progress`.

    kfp's own wait does not treat a canceled run as over.

    Raises:
        KubeflowAway: the server was unavailable for five minutes.
    """
    last_seen: dict[str, str] = {}
    pause, answered = POLL_S[0], clock()
    looked = answered
    while True:
        try:
            run = get(run.kubeflow, run.run_id)
            answered = clock()
        except KubeflowAway as exc:
            if clock() - answered > OUTAGE_S:
                exc.add_note(f"run {run.run_id} goes on without being watched: fineloop runs show {run.run_id}")
                raise
            if last_seen.get("") != "away":
                say(f"{exc}; asking again")
            last_seen[""] = "away"
        else:
            news = [*_news(run, last_seen)]
            if not run.is_over and clock() - looked >= PROGRESS_S:
                looked, further = clock(), progress()
                if further and last_seen.get("progress") != further:
                    last_seen["progress"] = further
                    news.append(further)
            for line in news:
                say(line)
            if run.is_over:
                return run
            pause = POLL_S[0] if news else min(pause * 1.5, POLL_S[1])
        sleep(pause)


def _news(run: Run, last_seen: dict[str, str]) -> list[str]:
    """Return lines on what has changed since the states in `last_seen`, and update these."""
    lines = []
    if not run.is_over and last_seen.get("") != run.state:
        last_seen[""] = run.state
        lines.append(f"{run.name} is {run.state.lower()}")
    for task in run.task_runs():
        if task.began and last_seen.get(task.name) != task.state:
            last_seen[task.name] = task.state
            how = "started" if task.state == "RUNNING" else task.state.lower()
            over = "" if task.seconds is None else f"{task.state.lower()} after {duration(task.seconds)}"
            lines.append(f"[{task.name}] {over or how}")
    return lines


def stop(
    kubeflow: Kubeflow,
    run: Run,
    *,
    then: Callable[[], None] = lambda: None,
    timeout_s: float = STOP_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Run:
    """Terminate a run and wait until it is over; a run that is over stays as it is.

    A run that is already being stopped is awaited. `then` is called when the run is being stopped, and again when
    it is over, because a step may have started a job in between.

    Raises:
        KubeflowError: it is not over after `timeout_s` seconds.
    """
    if run.is_over:
        then()
        return run
    with kubeflow.asking(f"stop run {run.run_id}"):
        try:
            kubeflow.client.terminate_run(run.run_id)
        except kfp_server_api.ApiException as exc:
            # The server answers 400 for a run that is being terminated, or that has just ended.
            if exc.status != 400 or get(kubeflow, run.run_id).state in ("PENDING", "RUNNING", "PAUSED"):
                raise
    then()
    deadline = time.monotonic() + timeout_s
    while not (now := get(kubeflow, run.run_id)).is_over:
        if time.monotonic() > deadline:
            raise KubeflowError(
                f"run {run.run_id} is still {now.state} after {timeout_s:.0f} s: see {run.url}, "
                "and `kubectl get workflows` in its namespace"
            )
        sleep(0.5)
    then()
    return now


class RunJobs:
    """Stops them as often as it is asked to; a cluster that cannot be reached from here is no error."""

    def __init__(self, run: Run, namespace: str) -> None:
        self._run_id = run.store_run_id
        section = run.config.table.get("ray", {})
        cluster = section.get("cluster", {}) if isinstance(section, Mapping) else {}
        self._ray = RayConfig()
        if cluster.get("kind") == "rayjob":
            where = cluster.get("namespace") or namespace or INSTALLED_IN
            self._ray = RayConfig(cluster=RayJobCluster(kind="rayjob", namespace=where))
        self._why = ""
        self.stopped: list[str] = []

    def stop(self) -> None:
        try:
            self.stopped += [each for each in stop_run(self._run_id, self._ray) if each not in self.stopped]
            self._why = ""
        except FineloopError as exc:
            self._why = str(exc)

    @property
    def lines(self) -> list[str]:
        said = [f"stopped {job_id}" for job_id in self.stopped]
        if self._why:
            said.append(f"its Ray jobs are left to its steps and to the cluster's `fineloop reap`: {self._why}")
        return said


# What a run's steps recorded in the store. Kubeflow itself reports neither why a step failed nor its progress.


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
        failed = [step for step in self._read(records.steps, nothing) if not step.succeeded]
        return {step.step: step.result["error"]["message"] for step in failed if "error" in step.result}

    def failed_notifications(self) -> dict[str, str]:
        """Return the notifications of the promotion that failed, and why."""
        nothing: list[StepRecord] = []
        return failed_notifications(self._read(records.steps, nothing))

    def progress(self) -> str:
        """Describe the training's progress; empty before its first steps are recorded."""
        found = self._read(lambda store, run_id: store.read(records.run_key(run_id, records.METRICS)), None)
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
        return self._read(lambda store, run_id: records.find(store, run_id, Decision, to_show=True), None)

    def metrics(self) -> dict[Role, dict[str, float | None] | None]:
        """Return the compared models' metrics by role, None for a role without one; empty before the comparison."""
        found = self._read(lambda store, run_id: records.find(store, run_id, Evaluation), None)
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
