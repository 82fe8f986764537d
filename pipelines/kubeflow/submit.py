"""Starts a run, and follows it until it is over."""

import time
from collections.abc import Callable
from typing import Any

from components.shared.durations import duration
from components.shared.errors import KubeflowAway
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import Kubeflow
from pipelines.kubeflow.package import Package, publish
from pipelines.kubeflow.run import Run, TaskRun

POLL_S = (0.5, 10.0)
"""Shortest and longest pause between requests, in seconds: short after a change, and growing while nothing changes."""
PROGRESS_S = 30.0
"""Seconds between reads of the training's progress."""
OUTAGE_S = 300.0
"""Seconds that the server may be unavailable before `follow` gives up; the run itself continues."""

Say = Callable[[str], None]


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
            run = runs.get(run.kubeflow, run.run_id)
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
                looked = clock()
                news += _further(progress(), last_seen)
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
            lines.append(f"[{task.name}] {_task_line(task)}")
    return lines


def _further(progress: str, last_seen: dict[str, str]) -> list[str]:
    if not progress or last_seen.get("progress") == progress:
        return []
    last_seen["progress"] = progress
    return [progress]


def _task_line(task: TaskRun) -> str:
    if task.seconds is None:
        return "started" if task.state == "RUNNING" else task.state.lower()
    return f"{task.state.lower()} after {duration(task.seconds)}"
