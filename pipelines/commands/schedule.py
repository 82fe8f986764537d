"""`fineloop schedule`: retraining by the clock, on Kubeflow."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from components.config import config_file
from components.shared.errors import UserError
from pipelines.commands.arguments import (
    CONFIG,
    EXPERIMENT,
    KUBEFLOW,
    PIPELINE,
    Answer,
    Takes,
    command,
    connected,
    load_config,
    option,
    prepared,
    table,
)

if TYPE_CHECKING:
    from pipelines.kubeflow.schedule import Schedule, Timing

ALLOWED = 3
OVERLAP = "when a run is under way at the next time: skip waits for its end and then runs once; allow runs beside it"
CRON = "minute, hour, day of month, month, day of week, in UTC: '0 2 * * *', '30 6 * * MON-FRI', or @daily"
NAME = option("name NAME", "the schedule")


def _moment(text: str) -> datetime:
    """A time; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a time such as 2027-01-31T06:00, in UTC, got {text!r}") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _timing(*, is_new: bool) -> tuple[Takes, ...]:
    """The options of when a schedule starts runs; those left out of an old one stay as they are."""
    return (
        option("--cron CRON", CRON, required=is_new),
        option("--overlap", OVERLAP, choices=("skip", "allow"), default="skip" if is_new else ""),
        option("--max-concurrency N", f"with --overlap allow: runs at once (default: {ALLOWED})", type=int, default=0),
        option("--start TIME", "not before, such as 2027-01-31T06:00", type=_moment),
        option("--end TIME", "not after", type=_moment),
    )


@command(
    "schedule create",
    *(NAME, *CONFIG, *_timing(is_new=True), *PIPELINE, EXPERIMENT, *KUBEFLOW),
    example="fineloop schedule create nightly --cron '0 2 * * *' -c pipelines/configs/icd10.toml",
)
def create(options: argparse.Namespace) -> Answer:
    """Retrain at the times that a cron expression names.

    Times are in UTC, unless Kubeflow's controller was given a CRON_SCHEDULE_TIMEZONE; missed ones are not made up for.
    """
    from pipelines.kubeflow import schedule
    from pipelines.kubeflow.schedule import Timing, parse

    timing = _timed(options, Timing(parse(options.cron)))
    built, parameters = prepared(options)
    made = schedule.create(
        connected(options),
        options.name,
        built,
        timing,
        parameters=parameters,
        experiment=options.experiment,
        service_account=options.service_account,
    )
    return _shown(made)


@command(
    "schedule update",
    *(NAME, *CONFIG, *_timing(is_new=False), *PIPELINE, *KUBEFLOW),
    lambda parser: parser.set_defaults(config=None, service_account=None),
    example="fineloop schedule update nightly --cron '0 4 * * *' --set train.epochs=2",
)
def update(options: argparse.Namespace) -> Answer:
    """Change a schedule; what is left out stays as it is, and a run that is under way goes on.

    The pipeline is compiled again, so that the next run has this version's steps.
    """
    from pipelines.kubeflow import schedule
    from pipelines.kubeflow.compile import check_reach, make_package, resolve_parameters

    cron = schedule.parse(options.cron) if options.cron else ""
    config = load_config(options) if options.config else None
    old = _find(options)
    timing = _timed(options, replace(old.timing, cron=cron or old.timing.cron))
    origin = f"the config of schedule {old.name}"
    config = config or config_file.validate(schedule.config_of(old), options.overrides, origin=origin)
    built = make_package(config, image=options.image or schedule.image_of(old))
    resolved = resolve_parameters(built.spec, config, options.parameters, kept=old.parameters)
    check_reach(config, resolved)
    new = schedule.update(old, built, timing, parameters=resolved, service_account=options.service_account)
    beside = "" if timing.max_concurrency > 1 else ", and the next time does not wait for its end"
    return _shown(new, going_on=old.live_runs(), beside=beside)


@command("schedule list", *KUBEFLOW, example="fineloop schedule list")
def list_(options: argparse.Namespace) -> Answer:
    """List the schedules."""
    from pipelines.kubeflow import schedule

    schedules = [one.as_json() for one in schedule.listed(connected(options))]
    rows = [("schedule", "state", "when (UTC)", "next", "adapter")]
    for one in schedules:
        state, times = "enabled" if one["enabled"] else "paused", _short(one["next"][:1]) or "-"
        rows.append((one["name"], state, one["words"] or one["kfp_cron"], times, one["adapter"]))
    none = "no schedules yet: `fineloop schedule create` makes one"
    return Answer({"schedules": schedules}, table(rows) if schedules else none)


@command("schedule show", NAME, *KUBEFLOW, example="fineloop schedule show nightly")
def show(options: argparse.Namespace) -> Answer:
    """Show a schedule: its times, its config's digest and its live runs."""
    shown = _find(options)
    return _shown(shown, going_on=shown.live_runs())


@command("schedule pause", NAME, *KUBEFLOW, example="fineloop schedule pause nightly")
def pause(options: argparse.Namespace) -> Answer:
    """Start no more runs; one that is under way goes on."""
    from pipelines.kubeflow import schedule

    paused = schedule.set_enabled(_find(options), False)
    return _shown(paused, going_on=paused.live_runs())


@command("schedule resume", NAME, *KUBEFLOW, example="fineloop schedule resume nightly")
def resume(options: argparse.Namespace) -> Answer:
    """Start runs again."""
    from pipelines.kubeflow import schedule

    return _shown(schedule.set_enabled(_find(options), True))


@command("schedule delete", NAME, *KUBEFLOW, example="fineloop schedule delete nightly")
def delete(options: argparse.Namespace) -> Answer:
    """Delete a schedule; a run that is under way goes on."""
    from pipelines.kubeflow import schedule

    gone = _find(options)
    going_on = gone.live_runs()
    schedule.delete(gone)
    body = {"name": gone.name, "deleted": True, "live_runs": going_on}
    return Answer(body, "\n".join([f"schedule {gone.name} is deleted", *_going_on(going_on)]))


def _find(options: argparse.Namespace) -> "Schedule":
    from pipelines.kubeflow import schedule

    return schedule.find(connected(options), options.name)


def _timed(options: argparse.Namespace, timing: "Timing") -> "Timing":
    """The timing with what the options say in place of what it had."""
    at_once = options.max_concurrency or (1 if options.overlap == "skip" else 0)
    if options.overlap == "allow" and not at_once:
        at_once = max(timing.max_concurrency, ALLOWED)
    if (options.overlap == "skip") != (at_once == 1) and at_once:
        raise UserError(
            f"--overlap {options.overlap or 'skip'} with --max-concurrency {at_once}: skip means 1, allow 2 to 10"
        )
    changes = {"max_concurrency": at_once, "start": options.start, "end": options.end}
    return replace(timing, **{name: value for name, value in changes.items() if value}).checked(datetime.now(UTC))


def _shown(schedule: "Schedule", going_on: Sequence[str] = (), *, beside: str = "") -> Answer:
    body = schedule.as_json()
    at_once = body["max_concurrency"]
    rows = [
        ("schedule", body["name"]),
        ("state", "enabled" if body["enabled"] else "paused"),
        ("when", f"{body['words'] or body['kfp_cron']}, UTC"),
        ("next", _short(body["next"]) or ("none" if body["enabled"] else "none while it is paused")),
        ("overlap", "skip: one run at a time" if at_once == 1 else f"allow: up to {at_once} runs at once"),
        *((name, _short([body[name]])) for name in ("start", "end") if body[name]),
        ("adapter", body["adapter"] or "-"),
        ("config", f"sha256 {body['config_digest']}" if body["config_digest"] else "-"),
        ("url", body["url"]),
    ]
    return Answer({**body, "live_runs": list(going_on)}, "\n".join([table(rows), *_going_on(going_on, beside)]))


def _going_on(run_ids: Sequence[str], beside: str = "") -> list[str]:
    return [f"run {run_id} goes on{beside}; to stop it: fineloop runs stop {run_id}" for run_id in run_ids]


def _short(stamps: Sequence[str]) -> str:
    return ", ".join(stamp.replace("T", " ").removesuffix(":00Z").removesuffix("Z") for stamp in stamps)
