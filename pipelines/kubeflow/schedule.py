"""Creates, updates and deletes schedules. A schedule is one recurring run of Kubeflow, identified by its name.

Kubeflow cannot change a recurring run. So an update first creates the new one, then disables and deletes the old one. A
crash in between leaves two, never none, and the next update or deletion removes the older one. A recurring run owns the
workflows that it started; deleting it would end them, so it is deleted with the policy ORPHAN (servers since 2.16), and
the runs that it has started continue.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cronsim import CronSim, CronSimError

from components.shared.errors import ConfigError, UserError
from components.step.step import IMAGE
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import Kubeflow, one_of
from pipelines.kubeflow.compile import PIPELINE, GivenConfig, Package, images_of, publish, sent
from pipelines.kubeflow.runs import specs, stamp

MAX_CONCURRENCY = 10


@dataclass(frozen=True)
class Timing:
    """When a schedule starts runs. `cron` has five parsed fields, in UTC.

    If `max_concurrency` is 1 and several times pass during a run, only the last of them starts a run, when that run
    ends. Runs from before an update of the schedule do not count, as that makes another ScheduledWorkflow
    (kubeflow/pipelines 2.16, scheduled_workflow.go, GetNextScheduledEpoch).
    """

    cron: str
    max_concurrency: int = 1
    start: datetime | None = None
    end: datetime | None = None

    def next_times(self, now: datetime) -> list[datetime]:
        """Return the next five times, or fewer if `end` comes first."""
        times = itertools.islice(CronSim(self.cron, max(now, self.start or now).astimezone(UTC)), 5)
        return [time for time in times if self.end is None or time <= self.end]

    def checked(self, now: datetime) -> "Timing":
        """Return this timing, after a check that it will start a run. Raises UserError: it will not start a run, or
        Kubeflow does not accept it."""
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            raise UserError(f"--max-concurrency {self.max_concurrency}: Kubeflow takes 1 to {MAX_CONCURRENCY}")
        if not self.cron:
            raise UserError("this schedule was made elsewhere and has no cron of five fields: give one with --cron")
        if not self.next_times(now):
            raise UserError(f"--end {stamp(self.end)}: no time of {self.cron!r} comes before it")
        return self


class Schedule:
    """A schedule on the server, of kfp's records of its name, newest first; all but the first are older ones."""

    def __init__(self, kubeflow: Kubeflow, records: list[Any]) -> None:
        self.kubeflow, self.records, self.detail = kubeflow, records, records[0]
        self.name, self.is_enabled = str(self.detail.display_name), self.detail.status == "ENABLED"
        trigger = self.detail.trigger and self.detail.trigger.cron_schedule
        self.kfp_cron: str = trigger.cron if trigger else ""
        """Kubeflow's cron expression of six fields, the first of which is seconds."""
        period = (trigger.start_time, trigger.end_time) if trigger else (None, None)
        # The cron of five fields is empty for a schedule made elsewhere that has no such equivalent.
        self.timing = Timing(from_kfp(self.kfp_cron), int(self.detail.max_concurrency or 1), *period)
        self.parameters = sent(self.detail)
        self.config = GivenConfig.of(self.detail, {})
        """The config of each run; empty if a schedule made elsewhere leaves it to the pipeline's default."""
        self.url = f"{kubeflow.ui}/#/recurringrun/details/{self.detail.recurring_run_id}"

    def live_runs(self) -> list[str]:
        """Return the ids of live runs that it, or an older recurring run of its name, has started."""
        return runs.of_schedule(self.kubeflow, [record.recurring_run_id for record in self.records])

    def as_json(self) -> dict[str, Any]:
        timing = self.timing
        return {
            "name": self.name,
            "recurring_run_id": self.detail.recurring_run_id,
            "enabled": self.is_enabled,
            "cron": timing.cron,
            "kfp_cron": self.kfp_cron,
            "words": words(timing.cron) if timing.cron else "",
            "next": [stamp(time) for time in timing.next_times(datetime.now(UTC))]
            if timing.cron and self.is_enabled
            else [],
            "time_zone": "UTC",
            "overlap": "skip" if timing.max_concurrency == 1 else "allow",
            "max_concurrency": timing.max_concurrency,
            "catch_up": not self.detail.no_catchup,
            "start": stamp(timing.start),
            "end": stamp(timing.end),
            "adapter": self.config.adapter,
            "config_digest": self.config.digest,
            "pipeline_version_id": self.detail.pipeline_version_reference.pipeline_version_id,
            "service_account": self.detail.service_account or "",
            "url": self.url,
        }


def listed(kubeflow: Kubeflow, name: str = "") -> list[Schedule]:
    """Return every schedule of the pipeline, sorted by name, or the one with this name.

    If several have one name, the newest counts: an interrupted update may have left an older one.
    """
    pipelines, namespace = kubeflow.client.list_pipelines, kubeflow.namespace or None
    pipeline_id = kubeflow.id_of("pipeline", PIPELINE, pipelines, namespace=namespace)
    by_name: dict[str, list[Any]] = {}
    for record in _recurring_runs(kubeflow, name):
        reference = record.pipeline_version_reference
        if reference and reference.pipeline_id == pipeline_id:
            by_name.setdefault(record.display_name, []).append(record)
    for records in by_name.values():
        records.sort(key=lambda record: (record.created_at, record.status == "ENABLED"), reverse=True)
    return [Schedule(kubeflow, records) for _, records in sorted(by_name.items())]


def find(kubeflow: Kubeflow, name: str) -> Schedule:
    """Return the schedule with this name. Raises UserError: there is none."""
    for schedule in listed(kubeflow, name):
        return schedule
    raise UserError(f"{kubeflow.host} has no schedule {name!r}: see `fineloop schedule list`")


def create(
    kubeflow: Kubeflow,
    name: str,
    package: Package,
    timing: Timing,
    *,
    parameters: dict[str, Any],
    experiment: str,
    service_account: str = "",
) -> Schedule:
    """Create a schedule, enabled. Raises UserError: the name is taken, or is not valid."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise UserError(f"schedule {name!r}: a name is lower-case letters, digits and '-', at most 63 characters")
    if next(_recurring_runs(kubeflow, name), None):
        raise UserError(
            f"{kubeflow.host} has a recurring run {name!r} already: change it with `fineloop schedule update {name}`, "
            "or choose another name"
        )
    with kubeflow.asking("create the experiment"):
        made = kubeflow.client.create_experiment(experiment, namespace=kubeflow.namespace or None)
    about = {"experiment_id": made.experiment_id, "service_account": service_account or None}
    return _create(kubeflow, name, package, timing, parameters, about)


def update(
    old: Schedule, package: Package, timing: Timing, *, parameters: dict[str, Any], service_account: str | None = None
) -> Schedule:
    """Replace a schedule; a paused one stays paused, and the runs that it has started continue.

    `service_account` None keeps the schedule's account.
    """
    account = old.detail.service_account if service_account is None else service_account
    about = {"experiment_id": old.detail.experiment_id, "service_account": account or None, "enabled": old.is_enabled}
    new = _create(old.kubeflow, old.name, package, timing, parameters, about)
    delete(old)
    return new


def set_enabled(schedule: Schedule, enabled: bool) -> Schedule:
    """Pause or resume a schedule; live runs continue. Older recurring runs of its name are paused in either case."""
    client, schedule_id = schedule.kubeflow.client, schedule.detail.recurring_run_id
    with schedule.kubeflow.asking(f"{'resume' if enabled else 'pause'} schedule {schedule.name}"):
        for record in schedule.records[1:]:
            client.disable_recurring_run(record.recurring_run_id)
        (client.enable_recurring_run if enabled else client.disable_recurring_run)(schedule_id)
        changed = client.get_recurring_run(schedule_id)
    return Schedule(schedule.kubeflow, [changed, *schedule.records[1:]])


def delete(schedule: Schedule) -> None:
    """Delete a schedule, and older recurring runs of its name that an update left; live runs continue."""
    client = schedule.kubeflow.client
    for record in reversed(schedule.records):
        with schedule.kubeflow.asking(f"delete the recurring run {record.recurring_run_id} of {schedule.name}"):
            client.disable_recurring_run(record.recurring_run_id)
            client.recurring_runs.recurring_run_service_delete_recurring_run(
                record.recurring_run_id, propagation_policy="ORPHAN"
            )


def config_of(schedule: Schedule) -> Mapping[str, Any]:
    """The config of a schedule's runs. Raises ConfigError: the schedule was made elsewhere, and has none."""
    if not schedule.config.table:
        raise ConfigError(
            f"schedule {schedule.name} was not made by Fineloop and holds no config: give one with -c FILE"
        )
    return schedule.config.table


def image_of(schedule: Schedule) -> str:
    """Return the image of its steps; empty if it is the project's own, whose tag depends on the code's release."""
    spec = specs(schedule.kubeflow)(schedule.detail)
    others = {image for image in images_of(spec) if not image.startswith(IMAGE.partition(":")[0] + ":")}
    return others.pop() if len(others) == 1 else ""


def _create(
    kubeflow: Kubeflow,
    name: str,
    package: Package,
    timing: Timing,
    parameters: dict[str, Any],
    about: Mapping[str, Any],
) -> Schedule:
    """Create a recurring run; `about` is more of kfp's arguments, such as `experiment_id`."""
    version = publish(kubeflow, package)
    with kubeflow.asking(f"create schedule {name}"):
        record = kubeflow.client.create_recurring_run(
            job_name=name,
            description=f"Retrains {package.config.adapter.name} {words(timing.cron)} (UTC).",
            start_time=stamp(timing.start),
            end_time=stamp(timing.end),
            cron_expression=to_kfp(timing.cron),
            max_concurrency=timing.max_concurrency,
            no_catchup=True,
            params=parameters,
            **version,
            **about,
        )
    return Schedule(kubeflow, [record])


def _recurring_runs(kubeflow: Kubeflow, name: str) -> Iterator[Any]:
    filters = {"filter": one_of("display_name", name)} if name else {}
    namespace = kubeflow.namespace or None
    return kubeflow.listed("recurring_runs", kubeflow.client.list_recurring_runs, namespace=namespace, **filters)


# Cron expressions of five fields, as in crontab. Kubeflow Pipelines parses cron with robfig/cron v1: SECONDS come
# first, and five fields are accepted but mean something else (`0 2 * * *` is the second minute of every hour). Sunday
# is only 0, and L, W and # are not supported.

NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
NUM_FIELDS = 5


def parse(text: str) -> str:
    """Check a cron expression and return its five fields, with nicknames such as @daily replaced. Raises UserError: it
    is not valid, never matches a time, or uses what Kubeflow's scheduler does not support."""
    expression = " ".join(NICKNAMES.get(text.strip().lower(), text).upper().split())
    fields = expression.split()
    if len(fields) != NUM_FIELDS:
        raise UserError(
            f"--cron {text!r}: expected five fields (minute, hour, day of month, month, day of week) or one of "
            f"{', '.join(NICKNAMES)}, got {len(fields)}"
        )
    try:
        cron = CronSim(expression, datetime.now(UTC))
    except CronSimError as exc:
        raise UserError(
            f"--cron {text!r}: {str(exc).lower()}: minute takes 0-59, hour 0-23, day-of-month 1-31 as the months have "
            "them, month 1-12 or JAN-DEC, day-of-week 0-7 or SUN-SAT; each also *, lists, ranges and /steps"
        ) from exc
    if any(not isinstance(item, int) or item < 0 for item in cron.days | cron.weekdays):
        raise UserError(f"--cron {text!r}: Kubeflow's scheduler knows neither L nor #")
    return expression


def to_kfp(expression: str) -> str:
    """Convert five parsed fields to Kubeflow's six, in numbers; the first is seconds."""
    cron = CronSim(expression, datetime.now(UTC))
    weekdays = {day % 7 for day in cron.weekdays if isinstance(day, int)}
    sets: list[set[int]] = [cron.minutes, cron.hours, cron.days, cron.months, weekdays]
    # Keep a leading star: it decides whether day of month and day of week must both match.
    fields = [
        field if field.startswith("*") else ",".join(map(str, sorted(values)))
        for field, values in zip(expression.split(), sets, strict=True)
    ]
    return " ".join(["0", *fields])


def from_kfp(cron: str) -> str:
    """Convert Kubeflow's six fields to crontab's five; empty if there is no equivalent, so that the six are shown."""
    fields = cron.split()
    if len(fields) != NUM_FIELDS + 1 or fields[0] != "0":
        return ""
    try:
        return parse(" ".join(fields[1:]))
    except UserError:
        return ""


def words(expression: str) -> str:
    """Return five parsed fields in English."""
    text = CronSim(expression, datetime.now(UTC)).explain()
    return text[:1].lower() + text[1:]
