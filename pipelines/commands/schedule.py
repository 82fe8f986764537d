"""`fineloop schedule`: retraining by the clock, on Kubeflow."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from components.shared.errors import UserError
from pipelines.commands.arguments import (
    Answer,
    Command,
    add_command,
    add_config,
    add_experiment,
    add_group,
    add_kubeflow,
    add_pipeline,
    connected,
    load_config,
    prepared,
    table,
)

if TYPE_CHECKING:
    from pipelines.kubeflow.schedule import Schedule, Timing

ALLOWED = 3
OVERLAP = "when a run is under way at the next time: skip waits for its end and then runs once; allow runs beside it"
CRON = "minute, hour, day of month, month, day of week, in UTC: '0 2 * * *', '30 6 * * MON-FRI', or @daily"


def add_schedules(commands: Any) -> None:
    verbs = add_group(
        commands,
        "schedule",
        does="retrain by the clock on Kubeflow: create, list, show, update, pause, resume, delete",
        more="Retraining by the clock, on Kubeflow. Times are in UTC, unless Kubeflow's controller was\n"
        "given a CRON_SCHEDULE_TIMEZONE; missed ones are not made up for.",
        example="fineloop schedule create nightly --cron '0 2 * * *' -c pipelines/configs/icd10.toml",
    )
    create = _add(
        verbs,
        "create",
        _create,
        "Retrain at the times that a cron expression names.",
        "fineloop schedule create nightly --cron '0 2 * * *' -c pipelines/configs/icd10.toml",
    )
    create.add_argument("--cron", required=True, metavar="CRON", help=CRON)
    create.add_argument("--overlap", choices=("skip", "allow"), default="skip", help=OVERLAP)
    add_config(create)
    add_pipeline(create)
    add_experiment(create)

    update = _add(
        verbs,
        "update",
        _update,
        "Change a schedule; what is left out stays as it is, and a run that is under way goes on.",
        "fineloop schedule update nightly --cron '0 4 * * *' --set train.epochs=2",
        more="The pipeline is compiled again, so that the next run has this version's steps.",
    )
    update.add_argument("--cron", default="", metavar="CRON", help=CRON)
    update.add_argument("--overlap", choices=("skip", "allow"), default="", help=OVERLAP)
    add_config(update)
    update.set_defaults(config=None)
    add_pipeline(update, keeps=True)
    for parser in (create, update):
        parser.add_argument(
            "--max-concurrency",
            type=int,
            default=0,
            metavar="N",
            help=f"with --overlap allow: runs at once (default: {ALLOWED})",
        )
        parser.add_argument(
            "--start", type=_moment, default=None, metavar="TIME", help="not before, such as 2027-01-31T06:00"
        )
        parser.add_argument("--end", type=_moment, default=None, metavar="TIME", help="not after")
        add_kubeflow(parser)

    listing = add_command(verbs, "list", _list, does="List the schedules.", example="fineloop schedule list")
    add_kubeflow(listing)
    for verb, command, does in (
        ("show", _show, "Show a schedule: its times, its config's digest and its live runs."),
        ("pause", _pause, "Start no more runs; one that is under way goes on."),
        ("resume", _resume, "Start runs again."),
        ("delete", _delete, "Delete a schedule; a run that is under way goes on."),
    ):
        add_kubeflow(_add(verbs, verb, command, does, f"fineloop schedule {verb} nightly"))


def _add(verbs: Any, verb: str, command: Command, does: str, example: str, more: str = "") -> argparse.ArgumentParser:
    parser = add_command(verbs, verb, command, does=does, more=more, example=example)
    parser.add_argument("name", metavar="NAME", help="the schedule")
    return parser


def _create(options: argparse.Namespace) -> Answer:
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


def _update(options: argparse.Namespace) -> Answer:
    from components.config import config_file
    from pipelines.kubeflow import schedule
    from pipelines.kubeflow.compile import check_reach, make_package, resolve_parameters
    from pipelines.kubeflow.schedule import parse

    cron = parse(options.cron) if options.cron else ""
    given = load_config(options) if options.config else None
    old = _find(options)
    timing = _timed(options, replace(old.timing, cron=cron or old.timing.cron))
    origin = f"the config of schedule {old.name}"
    config = given or config_file.validate(schedule.config_of(old), options.overrides, origin=origin)
    built = make_package(config, image=options.image or schedule.image_of(old))
    resolved = resolve_parameters(built.spec, config, options.parameters, kept=old.parameters)
    check_reach(config, resolved)
    new = schedule.update(old, built, timing, parameters=resolved, service_account=options.service_account)
    beside = "" if timing.max_concurrency > 1 else ", and the next time does not wait for its end"
    return _shown(new, going_on=old.live_runs(), beside=beside)


def _list(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import schedule

    found = schedule.listed(connected(options))
    schedules = [one.as_json() for one in found]
    rows = [("schedule", "state", "when (UTC)", "next", "adapter")]
    rows += [
        (
            one["name"],
            "enabled" if one["enabled"] else "paused",
            one["words"] or one["kfp_cron"],
            _short(one["next"][:1]) or "-",
            one["adapter"],
        )
        for one in schedules
    ]
    return Answer(
        {"schedules": schedules}, table(rows) if schedules else "no schedules yet: `fineloop schedule create` makes one"
    )


def _show(options: argparse.Namespace) -> Answer:
    found = _find(options)
    return _shown(found, going_on=found.live_runs())


def _pause(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import schedule

    found = schedule.set_enabled(_find(options), False)
    return _shown(found, going_on=found.live_runs())


def _resume(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import schedule

    return _shown(schedule.set_enabled(_find(options), True))


def _delete(options: argparse.Namespace) -> Answer:
    from pipelines.kubeflow import schedule

    found = _find(options)
    going_on = found.live_runs()
    schedule.delete(found)
    body = {"name": found.name, "deleted": True, "live_runs": going_on}
    return Answer(body, "\n".join([f"schedule {found.name} is deleted", *_going_on(going_on)]))


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


def _moment(text: str) -> datetime:
    """A time; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a time such as 2027-01-31T06:00, in UTC, got {text!r}") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _shown(schedule: "Schedule", going_on: Sequence[str] = (), *, beside: str = "") -> Answer:
    body = schedule.as_json()
    at_once = body["max_concurrency"]
    times = _short(body["next"]) or ("none" if body["enabled"] else "none while it is paused")
    rows = [
        ("schedule", body["name"]),
        ("state", "enabled" if body["enabled"] else "paused"),
        ("when", f"{body['words'] or body['kfp_cron']}, UTC"),
        ("next", times),
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
