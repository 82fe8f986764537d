"""`fineloop submit`."""

import argparse
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_note, print_err
from pipelines.commands.kubeflow_arguments import add_experiment, add_kubeflow, add_pipeline, connected, prepared

if TYPE_CHECKING:
    from pipelines.kubeflow.run import Run

INTERRUPTED = 130


def add(commands: Any) -> None:
    """Add the command."""
    submit = add_command(
        commands,
        "submit",
        _submit,
        does="Run the pipeline on Kubeflow and follow it to its end.",
        more="The config is checked, and the pipeline compiled and uploaded, first; the run gets the resolved "
        "config as its parameter. Ctrl-C stops following, not the run. Exit code 1 also means that the run failed "
        "or was canceled.",
        example="fineloop submit -c pipelines/configs/icd10.toml --host http://localhost:8080 --set method.name=dora",
    )
    add_config(submit)
    add_kubeflow(submit)
    add_pipeline(submit)
    add_experiment(submit)
    add_note(submit)
    submit.add_argument("--run-name", default="", metavar="NAME", help="default: the adapter's name and the time")
    submit.add_argument("--no-wait", action="store_true", help="end as soon as the run is started")


def _submit(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow.recorded import Recorded, as_json, outcome_lines
    from pipelines.kubeflow.submit import follow, start

    built, parameters = prepared(options)
    kubeflow = connected(options)
    run = start(
        kubeflow,
        built,
        parameters=parameters,
        experiment=options.experiment,
        run_name=options.run_name or f"{built.config.adapter.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        service_account=options.service_account,
    )
    print_err(f"run {run.run_id}: {run.url}")
    if options.no_wait:
        return Answer(_body(run), f"{run.name} is started; fineloop runs show {run.run_id}")
    recorded = Recorded(run)
    try:
        run = follow(run, print_err, progress=recorded.progress)
    except KeyboardInterrupt:
        text = (
            f"no longer followed; {run.name} goes on\n"
            f"  see it    fineloop runs show {run.run_id}\n  stop it   fineloop runs stop {run.run_id}"
        )
        return Answer({**_body(run), "interrupted": True}, text, INTERRUPTED, is_aside=True)
    body = {**_body(run), **as_json(run, recorded)}
    lines = [f"{run.name} {run.state.lower()}", *outcome_lines(run, recorded), run.url]
    return Answer(body, "\n".join(lines), 0 if run.succeeded else 1)


def _body(run: "Run") -> dict[str, Any]:
    steps = {task.name: task.state for task in run.task_runs()}
    return {**run.as_json(), "config_digest": run.config.digest, "message": "", "steps": steps}
