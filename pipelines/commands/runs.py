"""`fineloop runs`: what ran, here or on Kubeflow, what came of it, and how to stop it there."""

import argparse
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.shared.durations import duration
from pipelines.commands.arguments import EXIT_CODES, Answer, add_command, add_config, add_home
from pipelines.commands.kubeflow_arguments import add_kubeflow, connected
from pipelines.commands.opened_registry import opened_registry
from pipelines.commands.table import table

if TYPE_CHECKING:
    from pipelines.kubeflow.run import Run, TaskRun

STATES = ("pending", "running", "succeeded", "failed", "skipped", "canceling", "canceled", "paused")
LOSS = "loss"


def add(commands: Any) -> None:
    """Add the group."""
    group = commands.add_parser(
        "runs",
        help="list and show runs; stop those on Kubeflow",
        description="What ran, on this machine or on Kubeflow, and what runs there now.",
        epilog="example:\n  fineloop runs list --state running\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    listing = add_command(
        verbs,
        "list",
        _list,
        does="List the newest runs.",
        more="If a Kubeflow Pipelines server is named, these are its runs, with their states; otherwise, and with "
        "--store, the runs in the registry's store, however they were started, with their results.",
        example="fineloop runs list --adapter icd10-chapters --state failed",
    )
    listing.add_argument("--adapter", default="", metavar="NAME", help="only runs that retrain this adapter")
    listing.add_argument("--experiment", default="", metavar="NAME", help="only runs of this experiment")
    listing.add_argument("--state", default="", choices=STATES, metavar="STATE", help=", ".join(STATES))
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="maximum number of runs (default: 20)")
    show = add_command(
        verbs,
        "show",
        _show,
        does="Show one run: what came of it, and each step with its state and times.",
        more="If a Kubeflow Pipelines server is named, a run there; otherwise, and with --store, one in the registry's "
        "store, with its report and what to do next.",
        example="fineloop runs show 3f2a",
    )
    stop = add_command(
        verbs,
        "stop",
        _stop,
        does="Stop a run and wait until it is over.",
        more="Its steps are terminated, and its Ray jobs are stopped: from here by the kubeconfig, or RAY_ADDRESS "
        "for a shared cluster; if they cannot be reached from here, by the steps and the cluster's own `fineloop "
        "reap`.",
        example="fineloop runs stop 3f2a",
    )
    for parser in (show, stop):
        parser.add_argument("run", metavar="RUN", help="id, the first digits of it, or name")
    for parser in (listing, show):
        parser.add_argument("--store", action="store_true", help="the store's, even where a Kubeflow is named")
        add_config(parser)
        add_home(parser)
    for parser in (listing, show, stop):
        add_kubeflow(parser)


def _list(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import client, runs

    if options.store or not (options.state or options.experiment or client.is_named(os.environ, host=options.host)):
        return _kept(options)

    found = runs.listed(
        connected(options),
        experiment=options.experiment,
        state=options.state,
        adapter=options.adapter,
        limit=options.limit,
    )
    rows = [("run", "name", "adapter", "state", "began", "took")]
    rows += [
        (run.run_id, run.name, run.config.adapter, run.state.lower(), began(run.detail.created_at), took(run))
        for run in found
    ]
    text = table(rows) if found else "no such runs yet: `fineloop submit` starts one"
    return Answer({"runs": [run.as_json() for run in found]}, text)


def _kept(options: argparse.Namespace) -> Answer:
    """What the store keeps."""
    from components.shared.metrics import metric_of, metrics_of
    from pipelines.local.past_runs import listed

    with opened_registry(options) as store:
        found = listed(store, options.home, adapter=options.adapter, limit=options.limit)
    chosen = metrics_of({run.metric for run in found} - {LOSS})
    measured = [LOSS, *(each.label for each in chosen)]
    rows = [("run", "began", "adapter", "outcome", *measured, "rate", "steps", "hours", "price", "note")]
    for run in found:
        values = [run.metrics.get(each.key) if each.key == run.metric else None for each in chosen]
        shown = [each.text(value) if value is not None else "-" for each, value in zip(chosen, values, strict=True)]
        rows.append(
            (
                *(run.run_id, run.began[:16].replace("T", " "), run.adapter, run.outcome),
                *("-" if run.loss is None else metric_of(LOSS).text(run.loss), *shown),
                *("-" if run.learning_rate is None else f"{run.learning_rate:.3g}", str(run.steps or "-")),
                *("-" if run.hours is None else f"{run.hours:.2f}", "-" if run.price is None else f"${run.price:,.2f}"),
                run.note,
            )
        )
    text = table(rows) if found else "no such runs yet: `fineloop run` starts one"
    if reports := [run.report.replace(run.run_id, "RUN") for run in found if run.report]:
        text += f"\nreports at {', '.join(dict.fromkeys(reports))}; fineloop runs show RUN says what came of one"
    return Answer({"runs": [vars(run) for run in found]}, text)


def _show(options: argparse.Namespace) -> Answer:
    from components.records.runs import run_key
    from pipelines.kubeflow import client, runs
    from pipelines.kubeflow.recorded import Recorded, as_json, outcome_lines

    if options.store or not client.is_named(os.environ, host=options.host):
        return _show_kept(options)
    run = runs.find(connected(options), options.run)
    recorded = Recorded(run)
    tasks = run.task_runs()
    rows = [
        ("run", run.run_id),
        ("name", run.name),
        ("state", run.state.lower()),
        ("adapter", run.config.adapter or "-"),
        ("config", f"sha256 {run.config.digest}" if run.config.digest else "-"),
        ("in the store", run_key(run.store_run_id)),
        ("began", began(run.detail.created_at)),
        ("took", took(run)),
        ("url", run.url),
    ]
    steps = [(f"  {task.name}", task.state.lower(), began(task.began), _lasted(task)) for task in tasks]
    body = {
        **run.as_json(),
        **as_json(run, recorded),
        "config_digest": run.config.digest,
        "store_run_id": run.store_run_id,
        "steps": {task.name: task.as_json() for task in tasks},
    }
    lines = [table(rows), *([table(steps)] if steps else []), *outcome_lines(run, recorded)]
    return Answer(body, "\n".join(lines))


def _show_kept(options: argparse.Namespace) -> Answer:
    """What the store keeps of one run, in the words of its report."""
    from components.config import config_file
    from components.records.runs import CONFIG, run_key
    from components.report.report import read_run
    from components.report.sections import headline, next_steps
    from components.shared.errors import IntegrityError
    from pipelines.local.past_runs import find, lock_of, one
    from pipelines.local.run import LOG

    with opened_registry(options) as store:
        run_id = find(store, options.run)
        kept = one(store, options.home, run_id)
        if kept.outcome.startswith("damaged"):
            raise IntegrityError(f"run {run_id} is {kept.outcome}")
        key = run_key(run_id, CONFIG)
        run = read_run(config_file.loads(store.get(key).decode(), origin=store.uri(key)), store, run_id)
        where = store.uri(run_key(run_id))
    folder = options.home / "runs" / run_id
    started_by, is_running = lock_of(folder)
    top = headline(run)
    verb = started_by.replace("retrain", "run") or "run"
    commands = [] if is_running else next_steps(run, home=str(options.home), verb=verb)
    rows = [
        ("run", run_id),
        ("adapter", kept.adapter),
        ("outcome", kept.outcome),
        ("version", kept.version or "-"),
        ("began", began(datetime.fromisoformat(kept.began))),
        ("took", duration(sum(step.seconds for step in run.steps))),
        ("report", kept.report or "-"),
        ("log", str(folder / LOG) if (folder / LOG).is_file() else "-"),
        ("in the store", where),
        *([("note", kept.note)] if kept.note else []),
    ]
    steps = [(f"  {step.step}", step.status, duration(step.seconds)) for step in run.steps]
    width = max((len(command) for command, _ in commands), default=0)
    lines = [table(rows), *([table(steps)] if steps else []), "", *filter(None, [top.title, top.lead, top.consequence])]
    lines += [f"  - {reason}" for reason in top.reasons]
    lines += ["", *(f"  {command:<{width}}  {why}" for command, why in commands)] if commands else []
    body = {
        **vars(kept),
        "decision": run.decision.decision if run.decision else None,
        "verdict": run.decision.verdict if run.decision else None,
        "reasons": list(top.reasons),
        "steps": {step.step: {"state": step.status, "seconds": step.seconds} for step in run.steps},
        "next": [command for command, _ in commands],
    }
    return Answer(body, "\n".join(lines))


def _stop(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import runs
    from pipelines.kubeflow.run_jobs import RunJobs

    kubeflow = connected(options)
    run = runs.find(kubeflow, options.run)
    jobs = RunJobs(run, options.namespace)
    stopped = runs.stop(kubeflow, run, then=jobs.stop)
    body = {"run_id": run.run_id, "state": stopped.state, "stopped": not run.is_over, "jobs": jobs.stopped}
    how = "was over already" if run.is_over else "is stopped"
    return Answer(body, "\n".join([f"{run.name} {how}: {stopped.state.lower()}", *jobs.lines]))


def began(moment: datetime | None) -> str:
    """A time for people."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if moment else "-"


def took(run: "Run") -> str:
    """How long a run took, or has taken so far."""
    end = run.detail.finished_at if run.is_over else datetime.now(UTC)
    return duration((end - run.detail.created_at).total_seconds()) if end and run.detail.created_at else "-"


def _lasted(task: "TaskRun") -> str:
    return "-" if task.seconds is None else duration(task.seconds)
