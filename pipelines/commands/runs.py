"""`fineloop runs`, `compare`, `reproduce` and `replay`: what ran, here or on Kubeflow, and what came of it."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import config_file
from components.records import runs as records
from components.records.runs import CONFIG, run_key
from components.records.steps import Decision
from components.shared.errors import IntegrityError
from components.shared.metrics import metric_of, metrics_of
from components.shared.protocol import duration
from pipelines.commands.arguments import (
    KUBEFLOW,
    REFERENCE,
    REGISTRY,
    Answer,
    command,
    connected,
    load_config,
    opened_registry,
    opened_version,
    option,
    print_err,
    table,
)
from pipelines.local import past_runs
from pipelines.local.display import Display, Elsewhere, is_live
from pipelines.local.past_runs import Side
from pipelines.local.run import LOG, Place, run

if TYPE_CHECKING:
    from components.report.report import Beside
    from pipelines.kubeflow.runs import Run

STATES = ("pending", "running", "succeeded", "failed", "skipped", "canceling", "canceled", "paused")
LOSS = "loss"
RUN = option("run RUN", "id, the first digits of it, or name")
STORE = option("--store", "the store's, even where a Kubeflow is named")


@command(
    "runs list",
    *REGISTRY,
    option("--adapter NAME", "only runs that retrain this adapter"),
    option("--experiment NAME", "only runs of this experiment"),
    option("--state STATE", ", ".join(STATES), default="", choices=STATES),
    option("--limit N", "maximum number of runs (default: 20)", type=int, default=20),
    *(STORE, *KUBEFLOW),
    example="fineloop runs list --adapter icd10-chapters --state failed",
)
def list_(options: argparse.Namespace) -> Answer:
    """List the newest runs.

    If a Kubeflow Pipelines server is named, these are its runs, with their states; otherwise, and with --store, the
    runs in the registry's store, however they were started, with their results.
    """
    from pipelines.kubeflow import client, runs

    if options.store or not (options.state or options.experiment or client.is_named(os.environ, host=options.host)):
        return _kept(options)
    filters = {name: getattr(options, name) for name in ("experiment", "state", "adapter", "limit")}
    listed = runs.listed(connected(options), **filters)
    rows = [("run", "name", "adapter", "state", "began", "took")]
    rows += [(one.run_id, one.name, one.config.adapter, one.state.lower(), *_times(one)) for one in listed]
    text = table(rows) if listed else "no such runs yet: `fineloop submit` starts one"
    return Answer({"runs": [one.as_json() for one in listed]}, text)


def _kept(options: argparse.Namespace) -> Answer:
    with opened_registry(options) as store:
        listed = past_runs.listed(store, options.home, adapter=options.adapter, limit=options.limit)
    chosen = metrics_of({one.metric for one in listed} - {LOSS})
    measured = [LOSS, *(metric.label for metric in chosen)]
    rows = [("run", "began", "adapter", "outcome", *measured, "rate", "steps", "hours", "price", "note")]
    for one in listed:
        values = [one.metrics.get(metric.key) if metric.key == one.metric else None for metric in chosen]
        shown = [metric.text(value) if value is not None else "-" for metric, value in zip(chosen, values, strict=True)]
        rate = "-" if one.learning_rate is None else f"{one.learning_rate:.3g}"
        loss = "-" if one.loss is None else metric_of(LOSS).text(one.loss)
        hours = "-" if one.hours is None else f"{one.hours:.2f}"
        price = "-" if one.price is None else f"${one.price:,.2f}"
        began = one.began[:16].replace("T", " ")
        steps = str(one.steps or "-")
        rows.append((one.run_id, began, one.adapter, one.outcome, loss, *shown, rate, steps, hours, price, one.note))
    text = table(rows) if listed else "no such runs yet: `fineloop run` starts one"
    if reports := [one.report.replace(one.run_id, "RUN") for one in listed if one.report]:
        text += f"\nreports at {', '.join(dict.fromkeys(reports))}; fineloop runs show RUN says what came of one"
    return Answer({"runs": [vars(one) for one in listed]}, text)


@command(
    "runs show",
    *REGISTRY,
    option("--follow", "show the progress of one in the store until it is over"),
    *(RUN, STORE, *KUBEFLOW),
    example="fineloop runs show 20261101-0300 --follow -c mine.toml",
)
def show(options: argparse.Namespace) -> Answer:
    """Show one run: what came of it, and each step with its state and times.

    If a Kubeflow Pipelines server is named, a run there; otherwise, and with --store, one in the registry's store, with
    its report and what to do next. With --follow, its progress until it is over, on any machine that can read the
    store: each step when it has ended, and the training's curve every 15 s. Ctrl-C stops following, not the run.
    """
    if options.follow:
        return _follow(options)
    from pipelines.kubeflow import client, runs

    if options.store or not client.is_named(os.environ, host=options.host):
        return _show_kept(options)
    run = runs.find(connected(options), options.run)
    recorded, tasks = runs.Recorded(run), run.task_runs()
    began, took = _times(run)
    rows = [
        ("run", run.run_id),
        ("name", run.name),
        ("state", run.state.lower()),
        ("adapter", run.config.adapter or "-"),
        ("config", f"sha256 {run.config.digest}" if run.config.digest else "-"),
        ("in the store", run_key(run.store_run_id)),
        ("began", began),
        ("took", took),
        ("url", run.url),
    ]
    steps = [
        (
            f"  {task.name}",
            task.state.lower(),
            _began(task.began),
            "-" if task.seconds is None else duration(task.seconds),
        )
        for task in tasks
    ]
    body = {
        **run.as_json(),
        **runs.as_json(run, recorded),
        "config_digest": run.config.digest,
        "store_run_id": run.store_run_id,
        "steps": {task.name: task.as_json() for task in tasks},
    }
    lines = [table(rows), *([table(steps)] if steps else []), *runs.outcome_lines(run, recorded)]
    return Answer(body, "\n".join(lines))


def _began(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if moment else "-"


def _times(run: "Run") -> tuple[str, str]:
    """When a run began, and how long it took, or has taken so far."""
    began, end = run.detail.created_at, run.detail.finished_at if run.is_over else datetime.now(UTC)
    return _began(began), duration((end - began).total_seconds()) if end and began else "-"


def _show_kept(options: argparse.Namespace) -> Answer:
    """What the store keeps of one run, in the words of its report."""
    from components.report.report import read_run
    from components.report.sections import headline, next_steps

    with opened_registry(options) as store:
        run_id = past_runs.find(store, options.run)
        kept = past_runs.one(store, options.home, run_id)
        if kept.outcome.startswith("damaged"):
            raise IntegrityError(f"run {run_id} is {kept.outcome}")
        key = run_key(run_id, CONFIG)
        run = read_run(config_file.loads(store.get(key).decode(), origin=store.uri(key)), store, run_id)
        where = store.uri(run_key(run_id))
    folder = options.home / "runs" / run_id
    started_by, is_running = past_runs.lock_of(folder)
    top = headline(run)
    verb = started_by.replace("retrain", "run") or "run"
    commands = [] if is_running else next_steps(run, home=str(options.home), verb=verb)
    rows = [
        ("run", run_id),
        ("adapter", kept.adapter),
        ("outcome", kept.outcome),
        ("version", kept.version or "-"),
        ("began", _began(datetime.fromisoformat(kept.began))),
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


@command("runs stop", RUN, *KUBEFLOW, example="fineloop runs stop 3f2a")
def stop(options: argparse.Namespace) -> Answer:
    """Stop a run and wait until it is over.

    Its steps are terminated, and its Ray jobs are stopped: from here by the kubeconfig, or RAY_ADDRESS for a shared
    cluster; if they cannot be reached from here, by the steps and the cluster's own `fineloop reap`.
    """
    from pipelines.kubeflow import runs

    run = runs.find(connected(options), options.run)
    stopped, jobs, lines = runs.stop(run, options.namespace)
    body = {"run_id": run.run_id, "state": stopped.state, "stopped": not run.is_over, "jobs": jobs}
    how = "was over already" if run.is_over else "is stopped"
    return Answer(body, "\n".join([f"{run.name} {how}: {stopped.state.lower()}", *lines]))


@command("watch", *REGISTRY, RUN, example="fineloop watch 20261101-0300 -c mine.toml")
def watch(options: argparse.Namespace) -> Answer:
    """The old name of `fineloop runs show RUN --follow`."""
    print_err("fineloop watch is called fineloop runs show --follow now")
    return _follow(options)


def _follow(options: argparse.Namespace) -> Answer:
    with opened_registry(options) as store:
        run_id = past_runs.find(store, options.run)
        elsewhere = Elsewhere(store, run_id, Display(sys.stderr, live=is_live(sys.stderr)))
        elsewhere.follow()
        decision = records.find(store, run_id, Decision, to_show=True)
    body: dict[str, Any] = {"run_id": run_id, "decision": decision.decision if decision else None, "error": None}
    if failed := elsewhere.failed:
        error = failed.result.get("error", {})
        text = f"{run_id} failed in {failed.step}: {error.get('message', 'its log says why')}"
        return Answer({**body, "error": error or None}, text, exit_code=1)
    why = f"; fineloop runs show {run_id} --store says why"
    return Answer(body, f"{run_id} is over: {(decision.verdict or decision.decision) + why if decision else 'trained'}")


@command(
    "compare",
    *REGISTRY,
    option("first RUN|NAME@VERSION", "a run, by its id or the beginning of it, or a version"),
    option("others RUN|NAME@VERSION", "what to compare with it", nargs="+"),
    option("--html FILE", "write it as a page, with curves and all records", type=Path),
    example="fineloop compare 20261126-0200 icd10-chapters@production --html side-by-side.html",
)
def compare(options: argparse.Namespace) -> Answer:
    """Compare runs: their configs, their metrics, and the records that turned right or wrong.

    Every run after the first is compared with it on the records that both were measured on, with the gate's bounds.
    Nothing is evaluated again.
    """
    with opened_registry(options) as store:
        sides = [past_runs.read_side(store, name) for name in (options.first, *options.others)]
    keys = past_runs.differing(sides)
    beside = [past_runs.compare(sides[0], other) for other in sides[1:]]
    about = ("name", "run_id", "version", "note")
    body: dict[str, Any] = {
        "runs": [{key: getattr(side, key) for key in about} | {"metrics": dict(side.metrics)} for side in sides],
        "config": keys,
        "against_first": [asdict(comparison) for comparison in beside],
    }
    texts = {key: ["-" if value is None else str(value) for value in values] for key, values in keys.items()}
    lines = list(_comparison_lines(sides, texts, beside))
    if options.html is not None:
        from components.report.report import build_side_by_side

        page = build_side_by_side(sides, texts, beside, generated_at=datetime.now(UTC))
        options.html.write_text(page, encoding="utf-8")
        body["page"] = str(options.html)
        lines += ["", f"page: {options.html}"]
    return Answer(body, "\n".join(lines))


def _comparison_lines(
    sides: Sequence[Side], texts: Mapping[str, Sequence[str]], beside: "Sequence[Beside]"
) -> Iterator[str]:
    from components.report.report import metric_rows

    names = [side.name for side in sides]
    yield table([("config", *names), *((key, *values) for key, values in texts.items())])
    yield ""
    yield table([("metric", *names), *((name, *row) for name, row in metric_rows([side.metrics for side in sides]))])
    for comparison, side in zip(beside, sides[1:], strict=True):
        if side.version and side.version == sides[0].version:
            yield f"\n{comparison.name} and {names[0]} are the same version, {side.version}"
            continue
        yield f"\n{comparison.name} against {names[0]}, on {comparison.records} records"
        yield from _gain_lines(comparison)
        right = sum(record.is_right for record in comparison.turned)
        yield f"  {right} turned right, {len(comparison.turned) - right} wrong"
        for record in comparison.turned[:5]:  # --json and --html have all
            sign = "right" if record.is_right else "wrong"
            yield f"    {sign}  {_clip(record.prompt)} -> {_clip(record.after)} (was {_clip(record.before)})"


def _gain_lines(compared: "Beside") -> Iterator[str]:
    from components.report.report import gain_text

    for key, gain in compared.gains.items():
        yield f"  {metric_of(key).label}: {gain_text(key, gain, compared.confidence)}"


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


@command(
    "replay", *REGISTRY, option("run RUN", "the run's id in the store"), example="fineloop replay 20261126-0200-icd10"
)
def replay(options: argparse.Namespace) -> Answer:
    """Decide on a run again from its stored evidence, and compare.

    Exit code 1 means that the verdict, or what it follows from, is not the recorded one.
    """
    from components.gate import gate

    with opened_registry(options) as store:
        replayed = gate.replay(store, options.run)
    recorded, now = replayed.recorded, replayed.now
    then = recorded.verdict or recorded.decision
    body = {
        "run_id": options.run,
        "adapter": now.adapter,
        "version": now.version,
        "same": replayed.is_same,
        "verdict": now.verdict,
        "basis_sha256": now.basis_sha256,
        "recorded": {"verdict": then, "basis_sha256": recorded.basis_sha256},
        "reasons": list(now.reasons),
        "unsigned": replayed.unsigned,
    }
    how = "again, by the same evidence" if replayed.is_same else f"today, and {then} then"
    lines = [f"{now.adapter} {now.version}: {now.verdict} {how}", *(f"  - {reason}" for reason in now.reasons)]
    lines += [f"  basis sha256 {now.basis_sha256}", *filter(None, [replayed.unsigned])]
    if not replayed.is_same and recorded.basis_sha256:
        lines += [f"  recorded     {recorded.basis_sha256}"]
    return Answer(body, "\n".join(lines), exit_code=0 if replayed.is_same else 1)


@command("reproduce", *REGISTRY, REFERENCE, example="fineloop reproduce icd10-chapters@production")
def reproduce(options: argparse.Namespace) -> Answer:
    """Train a version again from its lineage, and check whether the result is the same.

    It takes the recorded config, rate and dataset, trains on this machine and publishes the result without an alias.
    The same version id means the same bytes. If they differ, the metrics are compared with the gate's bounds. Exit code
    1 means that the metrics differ too.
    """
    config = load_config(options)
    with opened_version(options) as (store, version):
        note = f"reproduces {version.name}@{version.version}"
        made_from = past_runs.recipe_of(store, version, config, options.overrides, note=note)
    place = Place(options.home, sys.stderr, verbose=options.verbose)
    outcome = run(made_from.config, place, what="train", dataset_uri=made_from.dataset_uri)
    assert outcome.version is not None
    with opened_registry(options) as store:
        again = past_runs.reproduced(store, version, outcome.version, made_from)
    body = {
        "name": version.name,
        "version": version.version,
        "run_id": outcome.run_id,
        "reproduced_as": again.again,
        "same": again.is_same,
        "agrees": again.agrees,
        "differs": dict(again.differs),
        "compared": again.compared and asdict(again.compared),
    }
    lines = [f"{version.name} {again.version}: reproduced, byte by byte"]
    if again.compared is not None:
        how = "and the same metrics within their bounds" if again.agrees else "and other metrics"
        lines = [f"{version.name} {again.version}: other bytes, {how}, as {again.again}", *_gain_lines(again.compared)]
        lines += [f"  {key} was {then} and is {now}" for key, (then, now) in again.differs.items()]
    return Answer(body, "\n".join(lines), exit_code=0 if again.agrees else 1)
