"""`fineloop runs`: what ran, here or on Kubeflow, what came of it, and how to stop it there."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared.protocol import duration
from pipelines.commands.adapters import REFERENCE
from pipelines.commands.arguments import (
    Answer,
    add_command,
    add_group,
    add_kubeflow,
    connected,
    load_config,
    opened_registry,
    print_err,
    table,
)

if TYPE_CHECKING:
    from components.report.report import Beside
    from pipelines.kubeflow.runs import Run, TaskRun
    from pipelines.local.past_runs import Reproduced, Side

STATES = ("pending", "running", "succeeded", "failed", "skipped", "canceling", "canceled", "paused")
LOSS = "loss"


def add_runs(commands: Any) -> None:
    verbs = add_group(
        commands,
        "runs",
        does="list, show and follow runs; stop those on Kubeflow",
        more="What ran, on this machine or on Kubeflow, and what runs there now.",
        example="fineloop runs list --state running",
    )
    listing = add_command(
        verbs,
        "list",
        _list,
        does="List the newest runs.",
        more="If a Kubeflow Pipelines server is named, these are its runs, with their states; otherwise, and with "
        "--store, the runs in the registry's store, however they were started, with their results.",
        example="fineloop runs list --adapter icd10-chapters --state failed",
        opens_registry=True,
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
        "store, with its report and what to do next. With --follow, its progress until it is over, on any machine that "
        "can read the store: each step when it has ended, and the training's curve every 15 s. Ctrl-C stops following, "
        "not the run.",
        example="fineloop runs show 20261101-0300 --follow -c mine.toml",
        opens_registry=True,
    )
    show.add_argument("--follow", action="store_true", help="show the progress of one in the store until it is over")
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
    if options.follow:
        return _follow(options)
    from components.records.runs import run_key
    from pipelines.kubeflow import client, runs
    from pipelines.kubeflow.runs import Recorded, as_json, outcome_lines

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

    run = runs.find(connected(options), options.run)
    stopped, jobs, lines = runs.stop(run, options.namespace)
    body = {"run_id": run.run_id, "state": stopped.state, "stopped": not run.is_over, "jobs": jobs}
    how = "was over already" if run.is_over else "is stopped"
    return Answer(body, "\n".join([f"{run.name} {how}: {stopped.state.lower()}", *lines]))


def began(moment: datetime | None) -> str:
    """A time for people."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if moment else "-"


def took(run: "Run") -> str:
    """How long a run took, or has taken so far."""
    end = run.detail.finished_at if run.is_over else datetime.now(UTC)
    return duration((end - run.detail.created_at).total_seconds()) if end and run.detail.created_at else "-"


def _lasted(task: "TaskRun") -> str:
    return "-" if task.seconds is None else duration(task.seconds)


def add_watch(commands: Any) -> None:
    does, example = "The old name of `fineloop runs show RUN --follow`.", "fineloop watch 20261101-0300 -c mine.toml"
    watch = add_command(commands, "watch", _watch, does=does, example=example, is_listed=False, opens_registry=True)
    watch.add_argument("run", metavar="RUN", help="id in the store, or the first digits of it")


def _watch(options: argparse.Namespace) -> Answer:
    print_err("fineloop watch is called fineloop runs show --follow now")
    return _follow(options)


def _follow(options: argparse.Namespace) -> Answer:
    from components.records import runs as records
    from components.records.steps import Decision
    from pipelines.local.display import Display, Elsewhere, is_live
    from pipelines.local.past_runs import find

    with opened_registry(options) as store:
        run_id = find(store, options.run)
        run = Elsewhere(store, run_id, Display(sys.stderr, live=is_live(sys.stderr)))
        run.follow()
        decision = records.find(store, run_id, Decision, to_show=True)
    body: dict[str, Any] = {"run_id": run_id, "decision": decision.decision if decision else None, "error": None}
    if run.failed:
        error = run.failed.result.get("error", {})
        said = f"{run_id} failed in {run.failed.step}: {error.get('message', 'its log says why')}"
        return Answer({**body, "error": error or None}, said, exit_code=1)
    why = f"; fineloop runs show {run_id} --store says why"
    return Answer(body, f"{run_id} is over: {(decision.verdict or decision.decision) + why if decision else 'trained'}")


# `fineloop compare`.

SHOWN = 5
"""Records that turned, on the screen; --json and --html have all."""


def add_compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        _compare,
        does="Compare runs: their configs, their metrics, and the records that turned right or wrong.",
        more="Every run after the first is compared with it on the records that both were measured on, with the "
        "gate's bounds. Nothing is evaluated again.",
        example="fineloop compare 20261126-0200 icd10-chapters@production --html side-by-side.html",
        opens_registry=True,
    )
    parser.add_argument(
        "first", metavar="RUN|NAME@VERSION", help="a run, by its id or the beginning of it, or a version"
    )
    parser.add_argument("others", nargs="+", metavar="RUN|NAME@VERSION", help="what to compare with it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, with curves and all records")


def _compare(options: argparse.Namespace) -> Answer:
    from pipelines.local.past_runs import compare, differing, read_side

    with opened_registry(options) as store:
        sides = [read_side(store, wanted) for wanted in (options.first, *options.others)]
    keys = differing(sides)
    beside = [compare(sides[0], other) for other in sides[1:]]
    body: dict[str, Any] = {
        "runs": [
            {"name": each.name, "run_id": each.run_id, "version": each.version, "note": each.note}
            | {"metrics": dict(each.metrics)}
            for each in sides
        ],
        "config": keys,
        "against_first": [asdict(each) for each in beside],
    }
    lines = list(_comparison_lines(sides, keys, beside))
    if options.html is not None:
        options.html.write_text(_comparison_page(sides, keys, beside), encoding="utf-8")
        body["page"] = str(options.html)
        lines += ["", f"page: {options.html}"]
    return Answer(body, "\n".join(lines))


def _comparison_page(sides: "Sequence[Side]", keys: Mapping[str, list[Any]], beside: "Sequence[Beside]") -> str:
    from components.report.report import Column, build_side_by_side

    return build_side_by_side(
        [Column(each.name, each.run_id, each.version or "", each.note, each.metrics) for each in sides],
        {key: list(map(_value_text, values)) for key, values in keys.items()},
        beside,
        {each.name: each.curve for each in sides},
        generated_at=datetime.now(UTC),
    )


def _comparison_lines(
    sides: "Sequence[Side]", keys: Mapping[str, list[Any]], beside: "Sequence[Beside]"
) -> Iterator[str]:
    from components.report.report import gain_text, metric_rows
    from components.shared.metrics import metric_of

    names = [each.name for each in sides]
    yield table([("config", *names), *((key, *map(_value_text, values)) for key, values in keys.items())])
    yield ""
    yield table([("metric", *names), *((name, *row) for name, row in metric_rows([each.metrics for each in sides]))])
    for each, side in zip(beside, sides[1:], strict=True):
        if side.version and side.version == sides[0].version:
            yield f"\n{each.name} and {names[0]} are the same version, {side.version}"
            continue
        yield f"\n{each.name} against {names[0]}, on {each.records} records"
        for key, found in each.gains.items():
            yield f"  {metric_of(key).label}: {gain_text(key, found, each.confidence)}"
        right = sum(record.is_right for record in each.turned)
        yield f"  {right} turned right, {len(each.turned) - right} wrong"
        for record in each.turned[:SHOWN]:
            sign = "right" if record.is_right else "wrong"
            yield f"    {sign}  {_clip(record.prompt)} -> {_clip(record.after)} (was {_clip(record.before)})"


def _value_text(value: Any) -> str:
    return "-" if value is None else str(value)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


# `fineloop replay`.


def add_replay(commands: Any) -> None:
    parser = add_command(
        commands,
        "replay",
        _replay,
        does="Decide on a run again from its stored evidence, and compare.",
        more="Exit code 1 means that the verdict, or what it follows from, is not the recorded one.",
        example="fineloop replay 20261126-0200-icd10",
        is_listed=False,
        opens_registry=True,
    )
    parser.add_argument("run", metavar="RUN", help="the run's id in the store")


def _replay(options: argparse.Namespace) -> Answer:
    from components.gate.gate import replay

    with opened_registry(options) as store:
        replayed = replay(store, options.run)
    recorded, found = replayed.recorded, replayed.found
    body = {
        "run_id": options.run,
        "adapter": found.adapter,
        "version": found.version,
        "same": replayed.is_same,
        "verdict": found.verdict,
        "basis_sha256": found.basis_sha256,
        "recorded": {"verdict": recorded.verdict or recorded.decision, "basis_sha256": recorded.basis_sha256},
        "reasons": list(found.reasons),
        "unsigned": replayed.unsigned,
    }
    how = (
        "again, by the same evidence"
        if replayed.is_same
        else f"today, and {recorded.verdict or recorded.decision} then"
    )
    lines = [f"{found.adapter} {found.version}: {found.verdict} {how}", *(f"  - {reason}" for reason in found.reasons)]
    lines += [f"  basis sha256 {found.basis_sha256}", *filter(None, [replayed.unsigned])]
    if not replayed.is_same and recorded.basis_sha256:
        lines += [f"  recorded     {recorded.basis_sha256}"]
    return Answer(body, "\n".join(lines), exit_code=0 if replayed.is_same else 1)


# `fineloop reproduce`.


def add_reproduce(commands: Any) -> None:
    parser = add_command(
        commands,
        "reproduce",
        _reproduce,
        does="Train a version again from its lineage, and check whether the result is the same.",
        more="It takes the recorded config, rate and dataset, trains on this machine and publishes the result "
        "without an alias. The same version id means the same bytes. If they differ, the metrics are compared with "
        "the gate's bounds. Exit code 1 means that the metrics differ too.",
        example="fineloop reproduce icd10-chapters@production",
        opens_registry=True,
    )
    parser.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)


def _reproduce(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.past_runs import recipe_of, reproduced
    from pipelines.local.run import Place, run

    config = load_config(options)
    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        note = f"reproduces {version.name}@{version.version}"
        made_from = recipe_of(store, version, config, options.overrides, note=note)
    place = Place(options.home, sys.stderr, verbose=options.verbose)
    outcome = run(made_from.config, place, what="train", dataset_uri=made_from.dataset_uri)
    assert outcome.version is not None
    with opened_registry(options) as store:
        found = reproduced(store, version, outcome.version, made_from)
    body = {
        "name": version.name,
        "version": version.version,
        "run_id": outcome.run_id,
        "reproduced_as": found.again,
        "same": found.is_same,
        "agrees": found.agrees,
        "differs": dict(found.differs),
        "compared": None if found.compared is None else asdict(found.compared),
    }
    return Answer(body, "\n".join(_reproduction_lines(version.name, found)), exit_code=0 if found.agrees else 1)


def _reproduction_lines(name: str, found: "Reproduced") -> Iterator[str]:
    from components.report.report import gain_text
    from components.shared.metrics import metric_of

    if found.compared is None:
        yield f"{name} {found.version}: reproduced, byte by byte"
        return
    how = "other bytes, and the same metrics within their bounds" if found.agrees else "other bytes and other metrics"
    yield f"{name} {found.version}: {how}, as {found.again}"
    for key, gain in found.compared.gains.items():
        yield f"  {metric_of(key).label}: {gain_text(key, gain, found.compared.confidence)}"
    for key, (then, now) in found.differs.items():
        yield f"  {key} was {then} and is {now}"
